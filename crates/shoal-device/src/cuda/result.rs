//! One function for each call of the driver that we use, with a `Result`.
//!
//! Apart because it is the only place, with [`super::copies::calls`], that passes pointers to the driver. Streams, events and modules are types
//! without `Clone`, made here and destroyed by value here, so that whoever has one has a live one; what can make
//! memory vanish or be written behind a reference is an unsafe function.

#![expect(unsafe_code, reason = "calls the driver")]

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::ptr;

use cudarc::driver::sys;

use super::symbols::{Absent, Code, Opaque, Symbols, symbols};
use crate::device::ForeignStream;
use crate::error::DeviceError;

const SUCCESS: Code = 0;
const OUT_OF_MEMORY: Code = 2;
const NOT_READY: Code = 600;
/// Errors that all say that a graph is being captured: from `STREAM_CAPTURE_UNSUPPORTED` to
/// `STREAM_CAPTURE_WRONG_THREAD`.
const CAPTURE_CODES: core::ops::RangeInclusive<Code> = 900..=908;

/// A mode of capturing in which a thread may call everything; for threads and calls that no graph is about.
const CAPTURE_RELAXED: c_uint = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_uint;

/// The loaded driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Driver {
    pub(super) symbols: &'static Symbols,
}

/// The primary context of a device, retained.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextHandle(Opaque);
/// A stream.
#[derive(Debug)]
pub(super) struct StreamHandle(pub(super) Opaque);
/// An event.
#[derive(Debug)]
pub(super) struct EventHandle(Opaque);
/// Loaded code.
#[derive(Debug)]
pub(super) struct ModuleHandle(Opaque);
/// A kernel; lives as long as its module.
#[derive(Debug, Clone, Copy)]
pub(super) struct FunctionHandle(Opaque);
/// Device memory; the driver checks the number, so a stale one is an error and nothing worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryHandle(u64);

/// What a thread's capture mode was.
#[derive(Clone, Copy, Debug)]
pub(super) struct CaptureMode(c_uint);

impl CaptureMode {
    pub(super) const RELAXED: Self = Self(CAPTURE_RELAXED);

    pub(super) fn is_relaxed(self) -> bool {
        self.0 == CAPTURE_RELAXED
    }
}

/// How memory of device `ordinal` is asked for: page-locked on the device, not exportable.
fn properties(ordinal: c_int) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(ordinal),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(ordinal: c_int) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal }
}

pub(super) fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit sizes")
}

pub(super) fn pointer(at: u64) -> *mut c_void {
    ptr::with_exposed_provenance_mut(length(at))
}

fn opaque(stream: ForeignStream) -> Opaque {
    length(stream.handle())
}

/// True if the driver said that a graph is being captured.
pub(super) fn is_capture(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Driver { code, .. } if CAPTURE_CODES.contains(code))
}

/// True if the driver said that memory (of the device, or of what the call is about) is short.
pub(super) fn is_out_of_memory(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Driver { code: OUT_OF_MEMORY, .. })
}

impl Driver {
    /// Finds the driver.
    pub(super) fn load() -> Result<Self, Absent> {
        Ok(Self { symbols: symbols()? })
    }

    pub(super) fn check(self, call: &'static str, code: Code) -> Result<(), DeviceError> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(DeviceError::Driver { call, code, name: self.name_of(code) })
    }

    fn name_of(self, code: Code) -> String {
        let mut name: *const c_char = ptr::null();
        // SAFETY: the driver writes the address of a constant, or nothing, into a pointer of ours.
        let answer = unsafe { (self.symbols.error_name)(code, &raw mut name) };
        if answer != SUCCESS || name.is_null() {
            return "a code this driver has no name for".to_owned();
        }
        // SAFETY: the driver's names are constants that end with a zero.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }

    pub(super) fn init(self) -> Result<(), DeviceError> {
        // SAFETY: takes no pointer, may be called any number of times.
        let code = unsafe { (self.symbols.init)(0) };
        self.check("cuInit", code)
    }

    /// The newest CUDA version the driver speaks: 1000 * major + 10 * minor.
    pub(super) fn version(self) -> Result<i32, DeviceError> {
        let mut version = 0;
        // SAFETY: writes one number of ours.
        let code = unsafe { (self.symbols.driver_version)(&raw mut version) };
        self.check("cuDriverGetVersion", code).map(|()| version)
    }

    pub(super) fn device_count(self) -> Result<c_int, DeviceError> {
        let mut count = 0;
        // SAFETY: writes one number of ours.
        let code = unsafe { (self.symbols.device_count)(&raw mut count) };
        self.check("cuDeviceGetCount", code).map(|()| count)
    }

    pub(super) fn device(self, ordinal: c_int) -> Result<c_int, DeviceError> {
        let mut device = 0;
        // SAFETY: writes one number of ours.
        let code = unsafe { (self.symbols.device_get)(&raw mut device, ordinal) };
        self.check("cuDeviceGet", code).map(|()| device)
    }

    pub(super) fn device_name(self, device: c_int) -> Result<String, DeviceError> {
        let mut name = [0_u8; 256];
        let (start, length_max) = (name.as_mut_ptr().cast::<c_char>(), 255);
        // SAFETY: the driver writes at most 255 bytes, so the last stays zero.
        let code = unsafe { (self.symbols.device_name)(start, length_max, device) };
        self.check("cuDeviceGetName", code)?;
        Ok(CStr::from_bytes_until_nul(&name)
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default())
    }

    pub(super) fn total_memory(self, device: c_int) -> Result<u64, DeviceError> {
        let mut bytes = 0;
        // SAFETY: writes one number of ours.
        let code = unsafe { (self.symbols.device_total_memory)(&raw mut bytes, device) };
        self.check("cuDeviceTotalMem", code).map(|()| bytes as u64)
    }

    /// A number of this device that no other has.
    pub(super) fn device_uuid(self, device: c_int) -> Result<[u8; 16], DeviceError> {
        let mut uuid = [0; 16];
        // SAFETY: writes 16 bytes of ours.
        let code = unsafe { (self.symbols.device_uuid)(&raw mut uuid, device) };
        self.check("cuDeviceGetUuid", code).map(|()| uuid)
    }

    pub(super) fn attribute(
        self,
        device: c_int,
        attribute: sys::CUdevice_attribute,
    ) -> Result<c_int, DeviceError> {
        let mut value = 0;
        // SAFETY: writes one number of ours.
        let code = unsafe { (self.symbols.device_attribute)(&raw mut value, attribute as c_int, device) };
        self.check("cuDeviceGetAttribute", code).map(|()| value)
    }

    pub(super) fn retain_primary_context(self, device: c_int) -> Result<ContextHandle, DeviceError> {
        let mut context = 0;
        // SAFETY: writes one pointer of ours.
        let code = unsafe { (self.symbols.primary_context_retain)(&raw mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", code).map(|()| ContextHandle(context))
    }

    /// # Safety
    /// Retained before by this process and not used by it from now on (others may hold it on their own account).
    pub(super) unsafe fn release_primary_context(self, device: c_int) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.primary_context_release)(device) };
        self.check("cuDevicePrimaryCtxRelease", code)
    }

    pub(super) fn is_current(self, context: &ContextHandle) -> Result<bool, DeviceError> {
        let mut current = 0;
        // SAFETY: writes one pointer of ours.
        let code = unsafe { (self.symbols.context_current)(&raw mut current) };
        self.check("cuCtxGetCurrent", code).map(|()| current == context.0)
    }

    pub(super) fn push_context(self, context: &ContextHandle) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as its handle lives.
        let code = unsafe { (self.symbols.context_push)(context.0) };
        self.check("cuCtxPushCurrent", code)
    }

    pub(super) fn pop_context(self) -> Result<(), DeviceError> {
        let mut popped = 0;
        // SAFETY: writes one pointer of ours; concerns this thread's stack of contexts only.
        let code = unsafe { (self.symbols.context_pop)(&raw mut popped) };
        self.check("cuCtxPopCurrent", code)
    }

    /// Sets this thread's mode, and says what it was.
    pub(super) fn exchange_capture_mode(self, mode: CaptureMode) -> Result<CaptureMode, DeviceError> {
        let mut mode = mode.0;
        // SAFETY: reads and writes one number of ours; concerns this thread only.
        let code = unsafe { (self.symbols.exchange_capture_mode)(&raw mut mode) };
        self.check("cuThreadExchangeStreamCaptureMode", code).map(|()| CaptureMode(mode))
    }

    /// Free and total, of the current context's device.
    pub(super) fn memory_info(self) -> Result<(u64, u64), DeviceError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers of ours.
        let code = unsafe { (self.symbols.memory_info)(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo", code).map(|()| (free as u64, total as u64))
    }

    pub(super) fn granularity(self, ordinal: c_int) -> Result<u64, DeviceError> {
        let (mut bytes, properties) = (0, properties(ordinal));
        let smallest = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM as c_uint;
        // SAFETY: reads a structure and writes a number of ours.
        let code = unsafe { (self.symbols.granularity)(&raw mut bytes, &raw const properties, smallest) };
        self.check("cuMemGetAllocationGranularity", code).map(|()| bytes as u64)
    }

    pub(super) fn address_reserve(self, bytes: u64, alignment: u64) -> Result<u64, DeviceError> {
        let mut at = 0;
        // SAFETY: writes one number of ours; the driver picks unused addresses.
        let code =
            unsafe { (self.symbols.address_reserve)(&raw mut at, length(bytes), length(alignment), 0, 0) };
        self.check("cuMemAddressReserve", code).map(|()| at)
    }

    /// # Safety
    /// A whole reservation, in which nothing is mapped and which nobody uses any more.
    pub(super) unsafe fn address_free(self, at: u64, bytes: u64) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.address_free)(at, length(bytes)) };
        self.check("cuMemAddressFree", code)
    }

    pub(super) fn memory_create(self, ordinal: c_int, bytes: u64) -> Result<MemoryHandle, DeviceError> {
        let (mut handle, properties) = (0, properties(ordinal));
        // SAFETY: reads a structure and writes a number of ours.
        let code =
            unsafe { (self.symbols.memory_create)(&raw mut handle, length(bytes), &raw const properties, 0) };
        self.check("cuMemCreate", code).map(|()| MemoryHandle(handle))
    }

    /// Gives memory back; while it is mapped, the driver keeps it until it is not.
    pub(super) fn memory_release(self, memory: MemoryHandle) -> Result<(), DeviceError> {
        // SAFETY: takes a number, which the driver checks.
        let code = unsafe { (self.symbols.memory_release)(memory.0) };
        self.check("cuMemRelease", code)
    }

    /// # Safety
    /// The range lies in a reservation of the caller's, with nothing mapped in it.
    pub(super) unsafe fn memory_map(
        self,
        at: u64,
        bytes: u64,
        memory: MemoryHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.memory_map)(at, length(bytes), 0, memory.0, 0) };
        self.check("cuMemMap", code)
    }

    /// # Safety
    /// Exactly one whole mapping of the caller's, which no queued work uses (I5).
    pub(super) unsafe fn memory_unmap(self, at: u64, bytes: u64) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.memory_unmap)(at, length(bytes)) };
        self.check("cuMemUnmap", code)
    }

    /// Makes a mapping of the caller's readable and writable for device `ordinal`.
    pub(super) fn set_access(self, ordinal: c_int, at: u64, bytes: u64) -> Result<(), DeviceError> {
        let access = sys::CUmemAccessDesc {
            location: location(ordinal),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: reads one structure of ours; the driver checks the range.
        let code = unsafe { (self.symbols.set_access)(at, length(bytes), &raw const access, 1) };
        self.check("cuMemSetAccess", code)
    }

    /// Page-locks memory of this process for all contexts, and maps it for devices.
    ///
    /// # Safety
    /// The range is mapped memory of the caller's, and stays so until it is unregistered.
    pub(super) unsafe fn host_register(self, at: u64, bytes: u64) -> Result<(), DeviceError> {
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.host_register)(pointer(at), length(bytes), flags) };
        self.check("cuMemHostRegister", code)
    }

    /// # Safety
    /// Registered before, and no queued work uses it.
    pub(super) unsafe fn host_unregister(self, at: u64) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.host_unregister)(pointer(at)) };
        self.check("cuMemHostUnregister", code)
    }

    /// A little page-locked memory of the driver's own.
    pub(super) fn host_allocate(self, bytes: u64) -> Result<u64, DeviceError> {
        let mut start = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: writes one pointer of ours.
        let code = unsafe { (self.symbols.host_allocate)(&raw mut start, length(bytes), flags) };
        self.check("cuMemHostAlloc", code).map(|()| start.expose_provenance() as u64)
    }

    /// # Safety
    /// From `host_allocate`, and neither queued work nor a reference uses it.
    pub(super) unsafe fn host_free(self, at: u64) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.host_free)(pointer(at)) };
        self.check("cuMemFreeHost", code)
    }

    /// A stream that does not wait for the default stream.
    pub(super) fn stream_create(self) -> Result<StreamHandle, DeviceError> {
        let mut stream = 0;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: writes one pointer of ours.
        let code = unsafe { (self.symbols.stream_create)(&raw mut stream, flags) };
        self.check("cuStreamCreate", code).map(|()| StreamHandle(stream))
    }

    /// What is queued is still done.
    #[expect(clippy::needless_pass_by_value, reason = "the last use of the handle")]
    pub(super) fn stream_destroy(self, stream: StreamHandle) -> Result<(), DeviceError> {
        let StreamHandle(stream) = stream;
        // SAFETY: a live stream, and the last use of its handle.
        let code = unsafe { (self.symbols.stream_destroy)(stream) };
        self.check("cuStreamDestroy", code)
    }

    pub(super) fn stream_wait_event(
        self,
        stream: &StreamHandle,
        event: &EventHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: both live.
        let code = unsafe { (self.symbols.stream_wait_event)(stream.0, event.0, 0) };
        self.check("cuStreamWaitEvent", code)
    }

    pub(super) fn foreign_wait_event(
        self,
        stream: ForeignStream,
        event: &EventHandle,
    ) -> Result<(), DeviceError> {
        // SAFETY: the event lives, and whoever named the stream promised the same of it.
        let code = unsafe { (self.symbols.stream_wait_event)(opaque(stream), event.0, 0) };
        self.check("cuStreamWaitEvent", code)
    }

    /// An event that takes no time stamps.
    pub(super) fn event_create(self) -> Result<EventHandle, DeviceError> {
        let mut event = 0;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: writes one pointer of ours.
        let code = unsafe { (self.symbols.event_create)(&raw mut event, flags) };
        self.check("cuEventCreate", code).map(|()| EventHandle(event))
    }

    #[expect(clippy::needless_pass_by_value, reason = "the last use of the handle")]
    pub(super) fn event_destroy(self, event: EventHandle) -> Result<(), DeviceError> {
        let EventHandle(event) = event;
        // SAFETY: a live event, and the last use of its handle.
        let code = unsafe { (self.symbols.event_destroy)(event) };
        self.check("cuEventDestroy", code)
    }

    pub(super) fn event_record(self, event: &EventHandle, stream: &StreamHandle) -> Result<(), DeviceError> {
        // SAFETY: both live.
        let code = unsafe { (self.symbols.event_record)(event.0, stream.0) };
        self.check("cuEventRecord", code)
    }

    /// Whether a graph is being captured on a stream of others.
    pub(super) fn is_capturing(self, stream: ForeignStream) -> Result<bool, DeviceError> {
        let mut status = 0;
        // SAFETY: whoever named the stream promised that it lives; writes one number of ours.
        let code = unsafe { (self.symbols.stream_is_capturing)(opaque(stream), &raw mut status) };
        if CAPTURE_CODES.contains(&code) {
            return Ok(true);
        }
        self.check("cuStreamIsCapturing", code).map(|()| status != 0)
    }

    pub(super) fn event_record_foreign(
        self,
        event: &EventHandle,
        stream: ForeignStream,
    ) -> Result<(), DeviceError> {
        // SAFETY: the event lives, and whoever named the stream promised the same of it.
        let code = unsafe { (self.symbols.event_record)(event.0, opaque(stream)) };
        self.check("cuEventRecord", code)
    }

    /// Marks everything queued in the context. False: this driver cannot.
    pub(super) fn context_record(
        self,
        context: &ContextHandle,
        event: &EventHandle,
    ) -> Result<bool, DeviceError> {
        let Some(record) = self.symbols.context_record_event else { return Ok(false) };
        // SAFETY: both live.
        let code = unsafe { record(context.0, event.0) };
        self.check("cuCtxRecordEvent", code).map(|()| true)
    }

    /// Waits for everything queued in the current context.
    pub(super) fn context_synchronize(self) -> Result<(), DeviceError> {
        // SAFETY: takes no pointer.
        let code = unsafe { (self.symbols.context_synchronize)() };
        self.check("cuCtxSynchronize", code)
    }

    /// Whether everything before the mark is done.
    pub(super) fn event_query(self, event: &EventHandle) -> Result<bool, DeviceError> {
        // SAFETY: a live event.
        let code = unsafe { (self.symbols.event_query)(event.0) };
        if code == NOT_READY {
            return Ok(false);
        }
        self.check("cuEventQuery", code).map(|()| true)
    }

    /// # Safety
    /// `function` may be called once with `data`, on a thread of the driver's, and calls no driver function.
    pub(super) unsafe fn launch_host(
        self,
        stream: &StreamHandle,
        function: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.symbols.launch_host)(stream.0, function, data) };
        self.check("cuLaunchHostFunc", code)
    }

    /// Launches `blocks` blocks of `threads` threads.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameter types in their order; what they point to on the
    /// device stays until the kernel is done.
    pub(super) unsafe fn launch_kernel(
        self,
        function: FunctionHandle,
        blocks: u32,
        threads: u32,
        stream: &StreamHandle,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        let (parameters, extra) = (arguments.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the caller's promise; the driver has read the arguments when it returns.
        let code = unsafe {
            (self.symbols.launch_kernel)(
                function.0, blocks, 1, 1, threads, 1, 1, 0, stream.0, parameters, extra,
            )
        };
        self.check("cuLaunchKernel", code)
    }

    /// Compiles PTX for the current context's device.
    pub(super) fn module_load(self, ptx: &CStr) -> Result<ModuleHandle, DeviceError> {
        let mut module = 0;
        // SAFETY: reads text that ends with a zero, and writes one pointer of ours.
        let code = unsafe { (self.symbols.module_load)(&raw mut module, ptx.as_ptr().cast()) };
        self.check("cuModuleLoadData", code).map(|()| ModuleHandle(module))
    }

    /// # Safety
    /// No kernel of it is queued or running, and no [`FunctionHandle`] of it is used any more.
    #[expect(clippy::needless_pass_by_value, reason = "the last use of the handle")]
    pub(super) unsafe fn module_unload(self, module: ModuleHandle) -> Result<(), DeviceError> {
        let ModuleHandle(module) = module;
        // SAFETY: a live module, and the last use of its handle; otherwise the caller's promise.
        let code = unsafe { (self.symbols.module_unload)(module) };
        self.check("cuModuleUnload", code)
    }

    pub(super) fn module_function(
        self,
        module: &ModuleHandle,
        name: &CStr,
    ) -> Result<FunctionHandle, DeviceError> {
        let mut function = 0;
        // SAFETY: a live module, a name that ends with a zero; writes one pointer of ours.
        let code = unsafe { (self.symbols.module_function)(&raw mut function, module.0, name.as_ptr()) };
        self.check("cuModuleGetFunction", code).map(|()| FunctionHandle(function))
    }
}
