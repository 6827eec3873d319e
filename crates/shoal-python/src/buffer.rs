//! Memory as Python's buffer protocol sees it: a region's addresses going out, bytes to be staged coming in.
//!
//! Apart because it has `unsafe` (with `dlpack`, the only ones of the crate): the protocol is made of raw pointers.
//!
//! Exporting touches nothing, so a range that is not resident can be exported: whoever reads or writes it does so under a
//! guard (I13). The exporting object holds the region, and every consumer holds the exporting object, so the addresses stay
//! reserved for as long as anybody has them (I3).

#![expect(unsafe_code, reason = "the buffer protocol is made of raw pointers")]

use std::ffi::{c_int, c_void};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyOverflowError};
use pyo3::ffi;
use pyo3::prelude::*;
use shoal_memory::Region;

use crate::dlpack::{self, DlDevice};
use crate::owner::Owned;

/// A range of a region's addresses, as a `DLPack` tensor of bytes and, where the CPU can reach it, a writable buffer.
#[pyclass(frozen, module = "shoal._native")]
#[derive(Debug)]
pub(crate) struct RegionBuffer {
    /// Keeps the addresses reserved.
    region: Owned<Region>,
    address: u64,
    bytes: usize,
}

impl RegionBuffer {
    /// Makes a buffer over `bytes` bytes from `address`, which the caller has checked to lie in `region`.
    pub(crate) fn new(region: Region, address: u64, bytes: usize) -> Self {
        Self { region: Owned::new(region), address, bytes }
    }
}

#[pymethods]
impl RegionBuffer {
    #[getter]
    fn address(&self) -> u64 {
        self.address
    }

    fn __len__(&self) -> usize {
        self.bytes
    }

    fn __dlpack_device__(&self) -> PyResult<(i32, i32)> {
        Ok(DlDevice::of(self.region.get()?).pair())
    }

    /// A capsule. The stream is not looked at: what lies in a region has no stream of its own.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<Bound<'py, PyAny>>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = (stream, max_version);
        let region = self.region.get()?;
        if copy == Some(true) || dl_device.is_some_and(|wanted| wanted != DlDevice::of(region).pair()) {
            return Err(PyBufferError::new_err(
                "a region's memory is handed out where it lies, never copied",
            ));
        }
        dlpack::capsule(py, region, self.address, self.bytes)
    }

    /// # Safety
    /// `view` is null or points to a `Py_buffer` to be filled: the interpreter's promise.
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let buffer = slf.get();
        let region = buffer.region.get()?;
        if !DlDevice::of(region).is_cpu() {
            return Err(PyBufferError::new_err(
                "this memory is the GPU's, which a buffer of the CPU's cannot show: use shoal.torch.tensor, or DLPack",
            ));
        }
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        let length = ffi::Py_ssize_t::try_from(buffer.bytes)
            .map_err(|_| PyOverflowError::new_err("too long for a buffer"))?;
        let start = std::ptr::with_exposed_provenance_mut::<c_void>(usize::try_from(buffer.address)?);
        // SAFETY: `view` is valid for writing (checked, and the interpreter's promise); `start..start + length` is
        // reserved for as long as `slf` lives (I3), and the filled view holds a reference to `slf`. Nothing is read.
        let status = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, length, 0, flags) };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// Bytes of somebody else's object, to be read while the GIL is not held.
pub(crate) struct Bytes(PyUntypedBuffer);

impl Bytes {
    /// Exports an object's buffer.
    ///
    /// # Errors
    /// `TypeError` if it has none, `BufferError` if it is not contiguous.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if buffer.is_c_contiguous() {
            Ok(Self(buffer))
        } else {
            Err(PyBufferError::new_err("the bytes must be contiguous"))
        }
    }

    /// The bytes. The caller of the Python function promises not to write to them meanwhile.
    pub(crate) fn as_slice(&self) -> &[u8] {
        if self.0.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: the export keeps `len_bytes` contiguous bytes at `buf_ptr` alive for as long as `self`; that nobody
        // writes to them meanwhile is the documented condition of `Region.stage`.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast::<u8>(), self.0.len_bytes()) }
    }
}
