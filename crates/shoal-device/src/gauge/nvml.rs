//! A GPU by NVIDIA's management library (NVML), as `nvidia-smi` sees it.
//!
//! Bound by hand: eight functions, found by name when a gauge is opened, so that nothing of NVIDIA's is needed to build or
//! to start. The crate that wraps all of NVML brings a second version of several crates we have, for these eight. Codes are
//! plain numbers here, because a newer driver may answer one that no list of today has.
//!
//! What the driver shows is not always what one hopes for: in a container it may name processes by the host's numbers, name
//! none, or leave their bytes out. All of that is passed on as it is ([`shoal_core::drift`] says what is made of it).

#![expect(unsafe_code, reason = "loads a library and trusts its documented signatures")]

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::mem;
use std::ffi::CString;
use std::path::Path;

use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};

use super::{Gauge, GaugeError};

const LIBRARY: &str = "libnvidia-ml.so.1";
const SUCCESS: c_int = 0;
const NOT_SUPPORTED: c_int = 3;
const INSUFFICIENT_SIZE: c_int = 7;
/// What stands where the driver does not know a process's bytes.
const NOT_AVAILABLE: u64 = u64::MAX;
/// Entries that a list of processes begins with, and the most it may have.
const PROCESSES: usize = 64;
const PROCESSES_MAX: usize = 8_192;

/// An opaque pointer of the library. A number, so that what holds it may change threads, as the library allows.
type Handle = usize;

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlProcessInfo_t` as of its second version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ProcessInfo {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

type Plain = unsafe extern "C" fn() -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;
type HandleByUuid = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
type MemoryInfo = unsafe extern "C" fn(Handle, *mut Memory) -> c_int;
type Processes = unsafe extern "C" fn(Handle, *mut c_uint, *mut ProcessInfo) -> c_int;

/// The library, open for as long as this process lives.
#[derive(Debug)]
struct Library {
    name: String,
    handle: *mut c_void,
}

impl Library {
    fn open(name: &str) -> Result<Self, GaugeError> {
        let refuse = |why: String| GaugeError::Library { library: name.to_owned(), why };
        let path = CString::new(name).map_err(|error| refuse(error.to_string()))?;
        // SAFETY: `path` is a C string for the whole call; loading NVIDIA's library runs its initialisers, which are made
        // for that.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: called right after a failure on this thread; gives a C string of the loader's, or null.
            let said = unsafe { libc::dlerror() };
            let why = if said.is_null() {
                "no reason given".to_owned()
            } else {
                // SAFETY: not null, and valid until the next call of the loader on this thread.
                unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned()
            };
            return Err(refuse(why));
        }
        Ok(Self { name: name.to_owned(), handle })
    }

    /// The address of a function; none where this library does not have it.
    fn find(&self, function: &'static CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is of a library that is never closed, the name is a C string.
        let found = unsafe { libc::dlsym(self.handle, function.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    fn demand(&self, function: &'static CStr) -> Result<*mut c_void, GaugeError> {
        self.find(function).ok_or_else(|| GaugeError::Function {
            library: self.name.clone(),
            function: function.to_str().unwrap_or("a function"),
        })
    }
}

/// The functions that are called.
#[derive(Debug)]
struct Functions {
    shutdown: Plain,
    error_string: ErrorString,
    memory: MemoryInfo,
    /// Lists of processes: those that compute, those that draw, those that compute through MPS.
    processes: Vec<(&'static str, Processes)>,
}

/// Looks at one GPU. Makes no CUDA context.
#[derive(Debug)]
pub struct NvmlGauge {
    functions: Functions,
    device: Handle,
    uuid: String,
}

impl NvmlGauge {
    /// Looks at the GPU with this `uuid` (`"GPU-..."`, as `nvidia-smi -L` has it).
    ///
    /// # Errors
    /// [`GaugeError`]: no library, one that is too old, or no such GPU.
    pub fn open(uuid: &str) -> Result<Self, GaugeError> {
        Self::open_by(LIBRARY, uuid)
    }

    /// [`open`](Self::open) with another library in NVML's place.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at(library: &Path, uuid: &str) -> Result<Self, GaugeError> {
        Self::open_by(&library.to_string_lossy(), uuid)
    }

    fn open_by(library: &str, uuid: &str) -> Result<Self, GaugeError> {
        let library = Library::open(library)?;
        let [init, shutdown, error_string, by_uuid, memory] = [
            c"nvmlInit_v2",
            c"nvmlShutdown",
            c"nvmlErrorString",
            c"nvmlDeviceGetHandleByUUID",
            c"nvmlDeviceGetMemoryInfo",
        ]
        .map(|name| library.demand(name));
        // SAFETY: the signature is that of nvml.h.
        let init: Plain = unsafe { mem::transmute(init?) };
        // SAFETY: the signature is that of nvml.h.
        let shutdown: Plain = unsafe { mem::transmute(shutdown?) };
        // SAFETY: the signature is that of nvml.h.
        let error_string: ErrorString = unsafe { mem::transmute(error_string?) };
        // SAFETY: the signature is that of nvml.h.
        let by_uuid: HandleByUuid = unsafe { mem::transmute(by_uuid?) };
        // SAFETY: the signature is that of nvml.h.
        let memory: MemoryInfo = unsafe { mem::transmute(memory?) };
        let mut functions = Functions { shutdown, error_string, memory, processes: Vec::new() };
        // The newest of each that this library has; both versions have the same form. Older ones list less, not otherwise.
        for names in [
            [c"nvmlDeviceGetComputeRunningProcesses_v3", c"nvmlDeviceGetComputeRunningProcesses_v2"],
            [c"nvmlDeviceGetGraphicsRunningProcesses_v3", c"nvmlDeviceGetGraphicsRunningProcesses_v2"],
            [c"nvmlDeviceGetMPSComputeRunningProcesses_v3", c"nvmlDeviceGetMPSComputeRunningProcesses_v2"],
        ] {
            let found = names.iter().find_map(|name| Some((*name, library.find(name)?)));
            if let Some((name, address)) = found {
                // SAFETY: the signature is that of nvml.h.
                let list: Processes = unsafe { mem::transmute(address) };
                functions.processes.push((name.to_str().unwrap_or("a list of processes"), list));
            }
        }
        // SAFETY: may be called at any time; each success is ended by one shutdown, in `drop`.
        let code = unsafe { init() };
        functions.check("nvmlInit_v2", code)?;
        let mut gauge = Self { functions, device: 0, uuid: uuid.to_owned() };
        let refuse = |why: String| GaugeError::Driver { function: "nvmlDeviceGetHandleByUUID", code: 2, why };
        let name = CString::new(uuid).map_err(|error| refuse(error.to_string()))?;
        let mut device: Handle = 0;
        // SAFETY: the library is initialised, `name` is a C string and `device` a place for a handle for the whole call.
        let code = unsafe { by_uuid(name.as_ptr(), &raw mut device) };
        gauge.functions.check("nvmlDeviceGetHandleByUUID", code)?;
        gauge.device = device;
        Ok(gauge)
    }

    fn list(&self, name: &'static str, list: Processes) -> Result<Vec<ProcessInfo>, GaugeError> {
        let mut length = PROCESSES;
        loop {
            let mut found = vec![ProcessInfo::default(); length];
            let mut count = c_uint::try_from(length).unwrap_or(c_uint::MAX);
            // SAFETY: the library is initialised, `found` has room for `count` entries, and both live for the whole call.
            let code = unsafe { list(self.device, &raw mut count, found.as_mut_ptr()) };
            match code {
                NOT_SUPPORTED => return Ok(Vec::new()),
                INSUFFICIENT_SIZE if length < PROCESSES_MAX => length *= 2,
                code => {
                    self.functions.check(name, code)?;
                    found.truncate(count as usize);
                    return Ok(found);
                }
            }
        }
    }
}

impl Functions {
    fn check(&self, function: &'static str, code: c_int) -> Result<(), GaugeError> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: takes any number, and gives a string that lives as long as the library, or null.
        let said = unsafe { (self.error_string)(code) };
        let why = if said.is_null() {
            "no reason given".to_owned()
        } else {
            // SAFETY: not null, and a C string of the library's that is never freed.
            unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned()
        };
        Err(GaugeError::Driver { function, code, why })
    }
}

impl Gauge for NvmlGauge {
    fn source(&self) -> String {
        format!("NVML ({})", self.uuid)
    }

    fn read(&mut self) -> Result<Reading, GaugeError> {
        let mut memory = Memory::default();
        // SAFETY: the library is initialised and the handle its own; `memory` lives for the whole call.
        let code = unsafe { (self.functions.memory)(self.device, &raw mut memory) };
        self.functions.check("nvmlDeviceGetMemoryInfo", code)?;
        let mut processes: Vec<ProcessReading> = Vec::new();
        for (name, list) in &self.functions.processes {
            for info in self.list(name, *list)? {
                let bytes = (info.used != NOT_AVAILABLE).then_some(ByteCount(info.used));
                // One that draws and computes is in both lists with all that it has.
                match processes.iter_mut().find(|known| known.process == info.pid) {
                    Some(known) => known.bytes = known.bytes.max(bytes),
                    None => processes.push(ProcessReading { process: info.pid, bytes }),
                }
            }
        }
        Ok(Reading { total: ByteCount(memory.total), free: ByteCount(memory.free), processes })
    }
}

impl Drop for NvmlGauge {
    fn drop(&mut self) {
        // SAFETY: ends the one initialisation of this gauge.
        let code = unsafe { (self.functions.shutdown)() };
        if let Err(error) = self.functions.check("nvmlShutdown", code) {
            tracing::debug!(%error, "the management library was not closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// A library of NVML's form, of which a test says what it answers. `processes` is the body of the list's function.
    fn library(directory: &Path, name: &str, processes: &str) -> PathBuf {
        let code = format!(
            r#"
            typedef struct {{ unsigned long long total, free, used; }} memory_t;
            typedef struct {{ unsigned pid; unsigned long long used; unsigned gpu, compute; }} process_t;
            static int open;
            int nvmlInit_v2(void) {{ open++; return 0; }}
            int nvmlShutdown(void) {{ return --open < 0 ? 1 : 0; }}
            const char *nvmlErrorString(int code) {{ return code == 6 ? "Not Found" : 0; }}
            int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {{
                if (!open) return 1;
                if (uuid[4] != 'a') return 6;
                *device = (void *)7;
                return 0;
            }}
            int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {{
                if (device != (void *)7) return 2;
                memory->total = 1000; memory->free = 400; memory->used = 600;
                return 0;
            }}
            int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, process_t *found) {{ return 99; }}
            int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *found) {{ {processes} }}
            int nvmlDeviceGetGraphicsRunningProcesses_v2(void *device, unsigned *count, process_t *found) {{
                *count = 2;
                found[0] = (process_t){{ 1, 60, 0, 0 }};
                found[1] = (process_t){{ 5, 40, 0, 0 }};
                return 0;
            }}
            int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *device, unsigned *count, process_t *found) {{ return 3; }}
            "#
        );
        let (source, made) = (directory.join(format!("{name}.c")), directory.join(format!("lib{name}.so")));
        std::fs::write(&source, code).expect("written");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .args([&made, &source])
            .status()
            .expect("a C compiler, which Rust links with");
        assert!(compiled.success());
        made
    }

    #[test]
    fn memory_and_processes_are_read_from_what_the_library_has() {
        let scratch = tempfile::tempdir().expect("a directory");
        let said = "*count = 2; found[0] = (process_t){ 1, 50, 0, 0 }; found[1] = (process_t){ 2, -1ull, 0, 0 }; return 0;";
        let path = library(scratch.path(), "two", said);
        let mut gauge = NvmlGauge::open_at(&path, "GPU-a").expect("it is there");
        let of = |process, bytes: Option<u64>| ProcessReading { process, bytes: bytes.map(ByteCount) };
        let expected = Reading {
            total: ByteCount(1000),
            free: ByteCount(400),
            processes: vec![of(1, Some(60)), of(2, None), of(5, Some(40))],
        };
        assert_eq!(gauge.read().expect("it answers"), expected);
        assert_eq!(gauge.read().expect("it answers again"), expected);
        assert!(gauge.source().contains("GPU-a"));
        drop(gauge);
        let error = NvmlGauge::open_at(&path, "GPU-b").expect_err("no such GPU");
        assert_eq!(error.to_string(), "nvmlDeviceGetHandleByUUID failed: Not Found (code 6)");
    }

    #[test]
    fn a_list_of_any_length_is_read_and_a_refusal_is_told() {
        let scratch = tempfile::tempdir().expect("a directory");
        let said = "unsigned room = *count; *count = 300; if (room < 300) return 7; \
                    for (unsigned i = 0; i < 300; i++) found[i] = (process_t){ 1000 + i, 1, 0, 0 }; return 0;";
        let mut gauge =
            NvmlGauge::open_at(&library(scratch.path(), "many", said), "GPU-a").expect("it is there");
        assert_eq!(gauge.read().expect("it answers").processes.len(), 302);
        let mut gauge =
            NvmlGauge::open_at(&library(scratch.path(), "endless", "return 7;"), "GPU-a").expect("there");
        assert!(matches!(gauge.read(), Err(GaugeError::Driver { code: 7, .. })), "it has an end");
        let mut gauge =
            NvmlGauge::open_at(&library(scratch.path(), "lost", "return 15;"), "GPU-a").expect("there");
        let error = gauge.read().expect_err("refused").to_string();
        assert_eq!(error, "nvmlDeviceGetComputeRunningProcesses_v3 failed: no reason given (code 15)");
    }

    #[test]
    fn what_is_no_management_library_says_so() {
        let missing = NvmlGauge::open_at(Path::new("/nowhere/libnvidia-ml.so.1"), "GPU-a").expect_err("none");
        assert!(missing.to_string().contains("cannot be loaded"), "{missing}");
        let other = NvmlGauge::open_at(Path::new("libc.so.6"), "GPU-a").expect_err("another library");
        assert!(matches!(other, GaugeError::Function { function: "nvmlInit_v2", .. }), "{other}");
    }
}
