//! The driver's functions, found by name when first asked for.
//!
//! Apart because two things must be known before anything is called: that there is a driver, and that it has every
//! function we use. cudarc finds the library and gives the types; its own bindings panic on a missing function,
//! and their result type is an enum of the codes of one CUDA version, so that a newer driver's code would be
//! undefined behaviour. Hence this table: an error instead of a panic, and codes as plain numbers.

#![expect(unsafe_code, reason = "loads the driver's library and trusts its documented signatures")]

use core::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

/// An opaque pointer of the driver. A number, so that what holds it may change threads, as the driver allows.
pub(super) type Opaque = usize;
/// What every function answers.
pub(super) type Code = c_int;

/// Why there is no table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Absent {
    /// No driver library on this machine.
    Library,
    /// The driver is too old to have this function.
    Function(&'static str),
}

/// `cuCtxRecordEvent`, which drivers have from CUDA 12.5 on.
pub(super) type ContextRecordEvent = unsafe extern "C" fn(Opaque, Opaque) -> Code;

/// `cuMemcpyBatchAsync` as of CUDA 12.8: targets, sources, lengths, how many, attributes, the first copy that each is
/// for, how many of those, which copy failed, the stream.
pub(super) type CopyBatch = unsafe extern "C" fn(
    *const u64,
    *const u64,
    *const usize,
    usize,
    *const CopyAttributes,
    *const usize,
    usize,
    *mut usize,
    Opaque,
) -> Code;
/// The version of CUDA in which it has that signature.
const COPY_BATCH_VERSION: c_int = 12_080;

/// `CUmemcpyAttributes`: in which order sources are read, and where both ends lie.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyAttributes {
    pub(super) source_order: c_uint,
    /// Type and number.
    pub(super) source_at: [c_int; 2],
    /// Type and number.
    pub(super) target_at: [c_int; 2],
    pub(super) flags: c_uint,
}

macro_rules! symbols {
    ($($field:ident = $name:literal ($($argument:ty),*);)*) => {
        /// Every function we call, by what it does; signatures are those of cuda.h.
        #[derive(Debug)]
        pub(super) struct Symbols {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> Code,)*
            /// Only newer drivers have it.
            pub(super) context_record_event: Option<ContextRecordEvent>,
            /// Only newer drivers have it.
            pub(super) copy_batch: Option<CopyBatch>,
        }

        impl Symbols {
            fn load() -> Result<Self, Absent> {
                // SAFETY: opening the driver's library runs its initialisers, which NVIDIA made for that.
                let is_present = unsafe { sys::is_culib_present() };
                if !is_present {
                    return Err(Absent::Library);
                }
                // SAFETY: as above; it panics only where no library is found, which was asked just now.
                let library = unsafe { sys::culib() };
                $(
                    // SAFETY: the type is that of the function in cuda.h, whose ABI under one name never changes.
                    let found = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> Code>(concat!($name, "\0").as_bytes())
                    };
                    let $field = *found.map_err(|_| Absent::Function($name))?;
                )*
                // SAFETY: as above.
                let found = unsafe { library.get::<ContextRecordEvent>(b"cuCtxRecordEvent\0") };
                let context_record_event = found.ok().map(|found| *found);
                let mut found = Self { $($field,)* context_record_event, copy_batch: None };
                found.copy_batch = found.find_copy_batch();
                Ok(found)
            }

            /// Asks the driver for a newer function by the version in which it has the signature that we know.
            fn find_copy_batch(&self) -> Option<CopyBatch> {
                let (name, mut address) = (c"cuMemcpyBatchAsync", core::ptr::null_mut());
                // SAFETY: a name that ends with a zero, and a pointer of ours that is written.
                let code = unsafe { (self.address_of)(name.as_ptr(), &raw mut address, COPY_BATCH_VERSION, 0) };
                if code != 0 || address.is_null() {
                    return None;
                }
                // SAFETY: the function of this name in this version of cuda.h has this type.
                Some(unsafe { core::mem::transmute::<*mut c_void, CopyBatch>(address) })
            }
        }
    };
}

symbols! {
    init = "cuInit"(c_uint);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    address_of = "cuGetProcAddress"(*const c_char, *mut *mut c_void, c_int, c_ulonglong);
    error_name = "cuGetErrorName"(Code, *mut *const c_char);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_total_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    device_uuid = "cuDeviceGetUuid"(*mut [u8; 16], c_int);
    primary_context_retain = "cuDevicePrimaryCtxRetain"(*mut Opaque, c_int);
    primary_context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
    context_current = "cuCtxGetCurrent"(*mut Opaque);
    context_push = "cuCtxPushCurrent_v2"(Opaque);
    context_pop = "cuCtxPopCurrent_v2"(*mut Opaque);
    context_synchronize = "cuCtxSynchronize"();
    exchange_capture_mode = "cuThreadExchangeStreamCaptureMode"(*mut c_uint);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    granularity = "cuMemGetAllocationGranularity"(*mut usize, *const sys::CUmemAllocationProp, c_uint);
    address_reserve = "cuMemAddressReserve"(*mut u64, usize, usize, u64, c_ulonglong);
    address_free = "cuMemAddressFree"(u64, usize);
    memory_create = "cuMemCreate"(*mut u64, usize, *const sys::CUmemAllocationProp, c_ulonglong);
    memory_release = "cuMemRelease"(u64);
    memory_map = "cuMemMap"(u64, usize, usize, u64, c_ulonglong);
    memory_unmap = "cuMemUnmap"(u64, usize);
    set_access = "cuMemSetAccess"(u64, usize, *const sys::CUmemAccessDesc, usize);
    host_register = "cuMemHostRegister_v2"(*mut c_void, usize, c_uint);
    host_unregister = "cuMemHostUnregister"(*mut c_void);
    host_allocate = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost"(*mut c_void);
    stream_create = "cuStreamCreate"(*mut Opaque, c_uint);
    stream_destroy = "cuStreamDestroy_v2"(Opaque);
    stream_wait_event = "cuStreamWaitEvent"(Opaque, Opaque, c_uint);
    stream_is_capturing = "cuStreamIsCapturing"(Opaque, *mut c_uint);
    event_create = "cuEventCreate"(*mut Opaque, c_uint);
    event_destroy = "cuEventDestroy_v2"(Opaque);
    event_record = "cuEventRecord"(Opaque, Opaque);
    event_query = "cuEventQuery"(Opaque);
    copy = "cuMemcpyAsync"(u64, u64, usize, Opaque);
    copy_up = "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, Opaque);
    copy_down = "cuMemcpyDtoHAsync_v2"(*mut c_void, u64, usize, Opaque);
    copy_inside = "cuMemcpyDtoDAsync_v2"(u64, u64, usize, Opaque);
    fill = "cuMemsetD8Async"(u64, u8, usize, Opaque);
    launch_host = "cuLaunchHostFunc"(Opaque, unsafe extern "C" fn(*mut c_void), *mut c_void);
    launch_kernel = "cuLaunchKernel"(
        Opaque, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Opaque, *mut *mut c_void, *mut *mut c_void
    );
    module_load = "cuModuleLoadData"(*mut Opaque, *const c_void);
    module_unload = "cuModuleUnload"(Opaque);
    module_function = "cuModuleGetFunction"(*mut Opaque, Opaque, *const c_char);
}

/// The table of this process, or why there is none. Looked up once: a driver does not come while a process runs.
pub(super) fn symbols() -> Result<&'static Symbols, Absent> {
    static SYMBOLS: OnceLock<Result<Symbols, Absent>> = OnceLock::new();
    SYMBOLS.get_or_init(Symbols::load).as_ref().map_err(Clone::clone)
}
