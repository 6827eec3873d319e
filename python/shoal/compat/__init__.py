"""Other libraries' faces on this one: what uses them runs by changing an import.

:mod:`shoal.compat.kvcached` is kvcached's, :mod:`shoal.compat.torch_memory_saver` is torch_memory_saver's.
"""
