//! Memory as `DLPack` sees it: a region's addresses as a flat tensor of bytes, whatever device they are of.
//!
//! Apart because it is the other module of the crate with `unsafe`: the protocol is a C struct in a capsule. Chosen
//! because a consumer takes the device from the struct and asks nobody about the pointer, so a range in which nothing is
//! mapped can be handed out (I13 is the business of whoever reads it). The struct holds the region, so the addresses stay
//! reserved until the last tensor made of it is gone (I3).

#![expect(unsafe_code, reason = "the protocol is a C struct in a capsule")]

use std::ffi::{CStr, c_void};

use pyo3::ffi;
use pyo3::prelude::*;
use shoal_device::{DeviceKind, HostView};
use shoal_memory::Region;

use crate::owner::Owned;

/// The name of a capsule that nobody has taken the tensor out of yet.
const NAME: &CStr = c"dltensor";

/// What kind of device, and which.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DlDevice {
    kind: i32,
    id: i32,
}

impl DlDevice {
    /// The device that `region` lies on. A simulated device's addresses are the CPU's.
    pub(crate) fn of(region: &Region) -> Self {
        let info = region.manager().device().info();
        match info.kind {
            DeviceKind::Cuda => Self { kind: 2, id: i32::try_from(info.id.0).unwrap_or(i32::MAX) },
            _ => Self { kind: 1, id: 0 },
        }
    }

    pub(crate) const fn is_cpu(self) -> bool {
        self.kind == 1
    }

    pub(crate) const fn pair(self) -> (i32, i32) {
        (self.kind, self.id)
    }
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

const BYTE: DlDataType = DlDataType { code: 1, bits: 8, lanes: 1 };

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    dimensions: i32,
    dtype: DlDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// Who keeps the bytes where they are. Dropping it lets the GIL go if the thread has it, and leaves a fork alone.
pub(crate) enum Keeper {
    /// The addresses stay reserved.
    Region {
        /// Only kept.
        _kept: Owned<Region>,
    },
    /// The bytes stay as they are.
    Host {
        /// Only kept.
        _kept: Owned<HostView>,
    },
}

/// What a capsule points to. The consumer sees the first field only.
#[repr(C)]
struct Export {
    managed: DlManagedTensor,
    shape: [i64; 1],
    strides: [i64; 1],
    /// Keeps the bytes where they are.
    _keeper: Keeper,
}

/// # Safety
/// `managed` was made by [`capsule`] and is not used any more.
unsafe extern "C" fn delete(managed: *mut DlManagedTensor) {
    if managed.is_null() {
        return;
    }
    // SAFETY: it is the first field of an `Export` that `capsule` boxed, and the caller gives it up.
    drop(unsafe { Box::from_raw(managed.cast::<Export>()) });
}

/// Called by the interpreter when a capsule goes.
///
/// # Safety
/// `capsule` is a live capsule: the interpreter's promise.
unsafe extern "C" fn end_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter's promise. A capsule whose tensor was taken has another name.
    let is_ours = unsafe { ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) } != 0;
    if is_ours {
        // SAFETY: just checked to be a capsule of that name.
        let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()) };
        // SAFETY: nobody took it, so it is still as `capsule` made it.
        unsafe { delete(managed.cast()) };
    }
}

/// `bytes` bytes from `address`, which the caller has checked to lie in `region`, as a capsule. Nothing is touched.
pub(crate) fn capsule<'py>(
    py: Python<'py>,
    region: &Region,
    address: u64,
    bytes: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let kept = Owned::new(region.clone());
    kept.get()?;
    wrap(py, DlDevice::of(region), usize::try_from(address)?, bytes, Keeper::Region { _kept: kept })
}

/// The bytes of a host copy as a capsule of the CPU's.
pub(crate) fn host_capsule(py: Python<'_>, view: HostView) -> PyResult<Bound<'_, PyAny>> {
    let (address, bytes) = (view.as_slice().as_ptr().expose_provenance(), view.as_slice().len());
    wrap(py, DlDevice { kind: 1, id: 0 }, address, bytes, Keeper::Host { _kept: Owned::new(view) })
}

fn wrap(
    py: Python<'_>,
    device: DlDevice,
    address: usize,
    bytes: usize,
    keeper: Keeper,
) -> PyResult<Bound<'_, PyAny>> {
    let tensor = DlTensor {
        data: std::ptr::with_exposed_provenance_mut(address),
        device,
        dimensions: 1,
        dtype: BYTE,
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let mut export = Box::new(Export {
        managed: DlManagedTensor { tensor, context: std::ptr::null_mut(), deleter: Some(delete) },
        shape: [i64::try_from(bytes)?],
        strides: [1],
        _keeper: keeper,
    });
    export.managed.tensor.shape = export.shape.as_mut_ptr();
    export.managed.tensor.strides = export.strides.as_mut_ptr();
    let managed = Box::into_raw(export);
    // SAFETY: the pointer is not null, the name is static, and `end_capsule` knows what it points to.
    let object = unsafe { ffi::PyCapsule_New(managed.cast(), NAME.as_ptr(), Some(end_capsule)) };
    if object.is_null() {
        // SAFETY: no capsule took it.
        unsafe { delete(managed.cast()) };
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference, not null.
    Ok(unsafe { Bound::from_owned_ptr(py, object) })
}
