//! The device's primary context: finding it, retaining it, and being in it for the time of a call.
//!
//! Apart because every call of the driver needs two things of its thread, and the thread is the caller's: our
//! context current (its own, if another, comes back), and the relaxed capture mode, without which a graph that
//! another thread captures would make harmless calls fail, or they it. [`Bound`] is both, for one call.
//! The primary context is what torch and every other library of the process uses, so addresses, streams and
//! events are theirs too.

#![expect(unsafe_code, reason = "gives the retained context back")]

use core::ffi::c_int;
use core::marker::PhantomData;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::ids::DeviceId;

use super::result::{CaptureMode, ContextHandle, Driver};
use super::symbols::Absent;
use crate::device::{DeviceInfo, DeviceKind};
use crate::error::DeviceError;
use crate::hash::hash_bytes;

/// The oldest CUDA version of a driver that will do: our PTX is in its dialect. Drivers 470 and later.
const CUDA_MIN: i32 = 11_040;
/// The oldest compute capability that our kernels are compiled for.
const CAPABILITY_MIN: (c_int, c_int) = (7, 5);

const REMEDY_DRIVER: &str =
    "install NVIDIA's driver 470 or newer (nvidia-smi shows it), or use device = \"sim\"";

/// What the driver says of itself and of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaFacts {
    /// The newest CUDA version the driver speaks, as (major, minor).
    pub cuda: (i32, i32),
    /// The device's compute capability.
    pub capability: (i32, i32),
    /// Its multiprocessors.
    pub multiprocessors: u32,
    /// True if kernels reach registered host memory at its address in the process.
    pub reaches_host: bool,
}

#[derive(Debug)]
pub(super) struct Context {
    driver: Driver,
    device: c_int,
    ordinal: c_int,
    id: DeviceId,
    handle: ContextHandle,
}

fn unavailable(id: DeviceId, reason: String, remedy: &'static str) -> DeviceError {
    DeviceError::Unavailable { device: id, reason, remedy }
}

/// The driver, initialised and new enough.
fn open_driver(id: DeviceId) -> Result<(Driver, i32), DeviceError> {
    let driver = Driver::load().map_err(|absent| {
        let reason = match absent {
            Absent::Library => "no NVIDIA driver (libcuda.so) is installed here".to_owned(),
            Absent::Function(name) => format!("the NVIDIA driver is too old: it has no {name}"),
        };
        unavailable(id, reason, REMEDY_DRIVER)
    })?;
    driver.init().map_err(|error| {
        let remedy =
            "check nvidia-smi and CUDA_VISIBLE_DEVICES; start a container with access to the GPU (--gpus all)";
        unavailable(id, format!("the NVIDIA driver shows this process no device ({error})"), remedy)
    })?;
    let version = driver.version()?;
    if version < CUDA_MIN {
        let reason = format!(
            "the NVIDIA driver speaks CUDA {}.{}, and 11.4 is the least",
            version / 1000,
            version % 1000 / 10
        );
        return Err(unavailable(id, reason, REMEDY_DRIVER));
    }
    Ok((driver, version))
}

/// How many CUDA devices this process can see, without making a context on any.
///
/// # Errors
/// `Unavailable` without a usable driver.
pub fn device_count() -> Result<u32, DeviceError> {
    let (driver, _) = open_driver(DeviceId(0))?;
    Ok(u32::try_from(driver.device_count()?).unwrap_or(0))
}

impl Context {
    pub(super) fn open(ordinal: u32) -> Result<(Self, DeviceInfo, CudaFacts), DeviceError> {
        let id = DeviceId(ordinal);
        let (driver, version) = open_driver(id)?;
        let count = driver.device_count()?;
        let Some(number) = c_int::try_from(ordinal).ok().filter(|number| *number < count) else {
            let reason = format!("this process sees {count} CUDA devices, counted from 0");
            return Err(unavailable(id, reason, "choose another, or check CUDA_VISIBLE_DEVICES"));
        };
        let device = driver.device(number)?;
        let name = driver.device_name(device)?;
        let capability = (
            driver.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            driver.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < CAPABILITY_MIN {
            let (major, minor) = capability;
            let reason = format!("{name} has compute capability {major}.{minor}, and 7.5 is the least");
            return Err(unavailable(id, reason, "use a GPU of the Turing generation or newer"));
        }
        let has_virtual_memory =
            driver.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)?;
        let has_unified_addresses =
            driver.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING)?;
        if has_virtual_memory == 0 || has_unified_addresses == 0 {
            let reason = format!("{name} has no virtual memory management through this driver");
            return Err(unavailable(id, reason, "use another GPU, driver or virtualisation"));
        }
        let multiprocessors =
            driver.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let reaches_host = driver
            .attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)?;
        let capacity = ByteCount(driver.total_memory(device)?);
        let granularity = ByteCount(driver.granularity(number)?.max(PAGE_BYTES.0));
        let handle = driver.retain_primary_context(device)?;
        let facts = CudaFacts {
            cuda: (version / 1000, version % 1000 / 10),
            capability,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
            reaches_host: reaches_host != 0,
        };
        let info = DeviceInfo { id, name, kind: DeviceKind::Cuda, granularity, capacity };
        Ok((Self { driver, device, ordinal: number, id, handle }, info, facts))
    }

    pub(super) fn driver(&self) -> Driver {
        self.driver
    }

    pub(super) fn handle(&self) -> &ContextHandle {
        &self.handle
    }

    pub(super) fn id(&self) -> DeviceId {
        self.id
    }

    pub(super) fn ordinal(&self) -> c_int {
        self.ordinal
    }

    /// This device with this driver and our kernels, in a line: what was measured on it holds for no other.
    pub(super) fn key(&self, info: &DeviceInfo, facts: &CudaFacts) -> Result<String, DeviceError> {
        let uuid = self.driver.device_uuid(self.device)?;
        let uuid = u128::from_be_bytes(uuid);
        // The driver's own number, where it is told; its CUDA version changes less often.
        let version = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let version = version.lines().next().unwrap_or_default().trim();
        let (major, minor) = facts.cuda;
        let kernels = hash_bytes(super::copies::PTX.as_bytes());
        Ok(format!("{} {uuid:032x}, CUDA {major}.{minor}, {version}, kernels {kernels:016x}", info.name))
    }

    /// Makes this thread ready for calls until the answer is dropped.
    pub(super) fn bind(&self) -> Result<Bound, DeviceError> {
        let driver = self.driver;
        let is_pushed = !driver.is_current(&self.handle)?;
        if is_pushed {
            driver.push_context(&self.handle)?;
        }
        // From here on dropping it undoes what was done.
        let mut bound = Bound { driver, is_pushed, mode: CaptureMode::RELAXED, of_this_thread: PhantomData };
        bound.mode = driver.exchange_capture_mode(CaptureMode::RELAXED)?;
        Ok(bound)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `open`; everything that uses it holds an `Arc` of this object.
        let released = unsafe { self.driver.release_primary_context(self.device) };
        if let Err(error) = released {
            // At the end of a process the driver may be gone before us.
            tracing::debug!(%error, "the primary context could not be given back");
        }
    }
}

/// A thread in our context and in relaxed capture mode; dropping it puts back what was.
#[derive(Debug)]
pub(super) struct Bound {
    driver: Driver,
    is_pushed: bool,
    mode: CaptureMode,
    /// What it undoes is the thread's.
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if !self.mode.is_relaxed()
            && let Err(error) = self.driver.exchange_capture_mode(self.mode)
        {
            tracing::error!(%error, "a thread's capture mode could not be restored");
        }
        if self.is_pushed
            && let Err(error) = self.driver.pop_context()
        {
            tracing::error!(%error, "a thread's CUDA context could not be restored");
        }
    }
}
