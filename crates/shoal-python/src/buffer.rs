//! Memory as Python's buffer protocol sees it: a region's addresses going out, bytes to be staged coming in.
//!
//! Apart because it has `unsafe` (with `dlpack`, the only ones of the crate): the protocol is made of raw pointers.
//!
//! Exporting touches nothing, so a range that is not resident can be exported: whoever reads or writes it does so under a
//! guard (I13). The exporting object holds the region, and every consumer holds the exporting object, so the addresses stay
//! reserved for as long as anybody has them (I3).

#![expect(unsafe_code, reason = "the buffer protocol is made of raw pointers")]

use std::ffi::{CStr, c_int, c_void};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyOverflowError, PyTypeError};
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

/// Memory of somebody else's object, to be written while the GIL is not held.
pub(crate) struct BytesMut(PyUntypedBuffer);

impl BytesMut {
    /// Exports an object's buffer.
    ///
    /// # Errors
    /// `TypeError` if it has none, `BufferError` if it is not contiguous or may not be written.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            Err(PyBufferError::new_err("the bytes must be contiguous"))
        } else if buffer.readonly() {
            Err(PyBufferError::new_err("the bytes may not be written"))
        } else {
            Ok(Self(buffer))
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len_bytes()
    }

    /// Writes all of it; nothing where `bytes` has another length. The caller of the Python function promises that nobody
    /// looks at it meanwhile.
    pub(crate) fn write(&self, bytes: &[u8]) {
        if bytes.is_empty() || bytes.len() != self.len() {
            return;
        }
        // SAFETY: the export keeps `len_bytes` contiguous bytes at `buf_ptr` alive for as long as `self`, and they may be
        // written (checked). `bytes` is a tier's memory, which no export shows. That nobody reads or writes them meanwhile
        // is the documented condition of `BlockStore.get`; a race would leave other bytes there, and nothing else.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.buf_ptr().cast::<u8>(), bytes.len()) };
    }
}

/// Integers in somebody else's buffer, to be read.
#[derive(Clone, Copy)]
pub(crate) enum Integers<'a> {
    Int32(&'a [i32]),
    Uint32(&'a [u32]),
    Int64(&'a [i64]),
    Uint64(&'a [u64]),
}

/// Integers in somebody else's buffer, to be written.
pub(crate) enum IntegersMut<'a> {
    Int32(&'a mut [i32]),
    Uint32(&'a mut [u32]),
    Int64(&'a mut [i64]),
    Uint64(&'a mut [u64]),
}

/// Gives `work` the integers of a contiguous buffer of 32 or 64 bits each: of a numpy array, an `array.array`, a memoryview,
/// or, by its `numpy` method, a torch tensor of the CPU. The GIL is held all the while, so nobody else of Python's writes to
/// them; `work` must not let it go.
///
/// # Errors
/// `TypeError` for anything else; `BufferError` if it is not contiguous.
pub(crate) fn with_integers<R>(
    object: &Bound<'_, PyAny>,
    work: impl FnOnce(Integers<'_>) -> PyResult<R>,
) -> PyResult<R> {
    lend(object, 0, true, |lent| match (lent.item, lent.is_signed) {
        (4, true) => work(Integers::Int32(lent.integers())),
        (4, false) => work(Integers::Uint32(lent.integers())),
        (_, true) => work(Integers::Int64(lent.integers())),
        (_, false) => work(Integers::Uint64(lent.integers())),
    })
}

/// The same to be written.
///
/// # Errors
/// The same, and `BufferError` if it may not be written.
pub(crate) fn with_integers_mut<R>(
    object: &Bound<'_, PyAny>,
    work: impl FnOnce(IntegersMut<'_>) -> PyResult<R>,
) -> PyResult<R> {
    lend(object, ffi::PyBUF_WRITABLE, true, |lent| match (lent.item, lent.is_signed) {
        (4, true) => work(IntegersMut::Int32(lent.integers_mut())),
        (4, false) => work(IntegersMut::Uint32(lent.integers_mut())),
        (_, true) => work(IntegersMut::Int64(lent.integers_mut())),
        (_, false) => work(IntegersMut::Uint64(lent.integers_mut())),
    })
}

/// A buffer that is lent to us, with integers that were checked to be aligned, contiguous and within it.
struct LentIntegers {
    at: *mut c_void,
    length: usize,
    item: usize,
    is_signed: bool,
}

impl LentIntegers {
    fn integers<T>(&self) -> &[T] {
        // SAFETY: `at` is aligned for `T`, whose size is `item`, and the exporter lends `length` items there until `lend`
        // returns. `T` is an integer, so any bytes are one. Nobody else of Python's writes meanwhile: the GIL is held.
        unsafe { std::slice::from_raw_parts(self.at.cast::<T>(), self.length) }
    }

    fn integers_mut<T>(&mut self) -> &mut [T] {
        // SAFETY: as in `integers`; the exporter was asked for memory that may be written.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast::<T>(), self.length) }
    }
}

/// Releases a buffer that was lent to us.
struct Release<'a>(&'a mut ffi::Py_buffer);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        // SAFETY: the view was filled by `PyObject_GetBuffer`, has not moved, and is released once, with the GIL held.
        unsafe { ffi::PyBuffer_Release(&raw mut *self.0) };
    }
}

fn lend<R>(
    object: &Bound<'_, PyAny>,
    flags: c_int,
    may_have_array: bool,
    work: impl FnOnce(&mut LentIntegers) -> PyResult<R>,
) -> PyResult<R> {
    let mut view = ffi::Py_buffer::new();
    let flags = flags | ffi::PyBUF_FORMAT | ffi::PyBUF_ND;
    // SAFETY: `object` is alive, and `view` is a `Py_buffer` to be filled that stays where it is until it is released.
    let status = unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut view, flags) };
    if status != 0 {
        let error = PyErr::fetch(object.py());
        // A torch tensor has no buffer, and shares its memory with an array that has one.
        return match object.getattr_opt("numpy") {
            // Asked once: what another kind of object answers may be itself.
            Ok(Some(method)) if may_have_array => lend(&method.call0()?, flags, false, work),
            _ => Err(error),
        };
    }
    let release = Release(&mut view);
    let view = &*release.0;
    let wrong = |found: &str| {
        PyTypeError::new_err(format!("block ids and tokens are integers of 32 or 64 bits, not {found}"))
    };
    if view.format.is_null() {
        return Err(wrong("bytes"));
    }
    // SAFETY: not null, so a C string of the exporter's that lives as long as the view.
    let format = unsafe { CStr::from_ptr(view.format) }.to_bytes();
    // One letter, in the machine's own order of bytes.
    let letter = match format {
        [b'@' | b'=' | b'<', letter] | [letter] => *letter,
        _ => return Err(wrong(&String::from_utf8_lossy(format))),
    };
    let is_signed = matches!(letter, b'i' | b'l' | b'q' | b'n');
    let item = usize::try_from(view.itemsize).unwrap_or(0);
    if !(is_signed || matches!(letter, b'I' | b'L' | b'Q' | b'N')) || !matches!(item, 4 | 8) {
        return Err(wrong(&format!("{:?} of {item} bytes", char::from(letter))));
    }
    let length = usize::try_from(view.len).unwrap_or(0) / item;
    let mut at = view.buf;
    if length == 0 {
        // An empty buffer may lie nowhere, which a slice may not.
        at = std::ptr::without_provenance_mut(item);
    } else if at.is_null() || at.addr() % item != 0 {
        return Err(PyBufferError::new_err("the integers of the buffer are not aligned"));
    }
    work(&mut LentIntegers { at, length, item, is_signed })
}
