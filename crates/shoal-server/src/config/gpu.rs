//! The NVIDIA GPUs of this machine, as `nvidia-smi` lists them.
//!
//! Apart because the server never makes a CUDA context: it would take half a gibibyte of the memory it shares out. It
//! needs to know three things once, at its start: whether the driver will do, how much is free, and which GPU the
//! workers will see as `cuda:N`. A program answers that without a library to bind; its absence is an error with a remedy.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;

/// The least driver that workers can use (CUDA 11.4).
pub const DRIVER_MIN: u32 = 470;
const WAIT_MAX: Duration = Duration::from_secs(20);
const OUTPUT_BYTES_MAX: u64 = 1 << 16;
const QUERY: &str = "--query-gpu=index,uuid,name,driver_version,memory.total,memory.free";

/// One GPU at the moment of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number on the machine, in the order of the PCI bus.
    pub index: u32,
    /// `GPU-...`.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// The driver's version.
    pub driver: String,
    /// Its memory.
    pub total: ByteCount,
    /// What no process holds.
    pub free: ByteCount,
}

impl Gpu {
    /// Whether the driver is new enough.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        let major = self.driver.split('.').next().and_then(|major| major.parse::<u32>().ok());
        major.is_some_and(|major| major >= DRIVER_MIN)
    }
}

/// What is known of the GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// All of the machine's, or why they cannot be listed.
    pub listed: Result<Vec<Gpu>, String>,
    /// `CUDA_VISIBLE_DEVICES`, where it is set.
    pub visible: Option<String>,
}

impl Gpus {
    /// Asks `nvidia-smi`.
    pub(super) fn ask(visible: Option<OsString>) -> Self {
        let visible = visible.map(|visible| visible.to_string_lossy().into_owned());
        let listed = listing(Path::new("nvidia-smi")).and_then(|text| read_listing(&text));
        Self { listed, visible }
    }

    /// The GPU that a worker sees as `cuda:ordinal`.
    ///
    /// # Errors
    /// A sentence that says why there is none.
    pub fn find(&self, ordinal: u32) -> Result<&Gpu, String> {
        let all = self.listed.as_ref().map_err(Clone::clone)?;
        let Some(visible) = &self.visible else {
            let missing = || format!("nvidia-smi lists {} GPUs, counted from 0", all.len());
            return all.get(ordinal as usize).ok_or_else(missing);
        };
        let hidden = || format!("CUDA_VISIBLE_DEVICES is {visible:?} and shows no such GPU");
        let name = visible.split(',').nth(ordinal as usize).map(str::trim).ok_or_else(hidden)?;
        let is_it = |gpu: &&Gpu| match name.parse::<u32>() {
            Ok(index) => gpu.index == index,
            Err(_) => name.starts_with("GPU-") && gpu.uuid.starts_with(name),
        };
        all.iter().find(is_it).ok_or_else(hidden)
    }
}

fn listing(program: &Path) -> Result<String, String> {
    let shown = program.display();
    let mut command = Command::new(program);
    command.args([QUERY, "--format=csv,noheader,nounits"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("{shown} cannot be run ({error})"))?;
    let deadline = Instant::now() + WAIT_MAX;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            other => {
                // Nothing more can be done about a process that does not even end when killed.
                let _ = child.kill();
                let _ = child.wait();
                return Err(match other {
                    Err(error) => format!("{shown} cannot be waited for ({error})"),
                    _ => format!("{shown} said nothing within {WAIT_MAX:?}"),
                });
            }
        }
    };
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = stdout.take(OUTPUT_BYTES_MAX).read_to_string(&mut text);
    }
    if status.success() {
        return Ok(text);
    }
    let said = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
    Err(format!("{shown} ended with {status} and said {said:?}"))
}

pub(crate) fn read_listing(text: &str) -> Result<Vec<Gpu>, String> {
    let mut gpus = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let mib = |field: &str| field.parse::<u64>().ok().map(ByteCount::mib);
        let gpu = match fields[..] {
            [index, uuid, name, driver, total, free] => index
                .parse()
                .ok()
                .zip(mib(total).zip(mib(free)))
                .map(|(index, (total, free))| (index, uuid, name, driver, total, free)),
            _ => None,
        };
        let Some((index, uuid, name, driver, total, free)) = gpu else {
            return Err(format!("nvidia-smi said {line:?}, which names no GPU with its memory"));
        };
        let (uuid, name, driver) = (uuid.to_owned(), name.to_owned(), driver.to_owned());
        gpus.push(Gpu { index, uuid, name, driver, total, free });
    }
    if gpus.is_empty() { Err("nvidia-smi lists no GPU".to_owned()) } else { Ok(gpus) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 81008\n\
                       1, GPU-bbbb-2, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 1024\n";

    fn gpus(visible: Option<&str>) -> Gpus {
        Gpus { listed: read_listing(TWO), visible: visible.map(str::to_owned) }
    }

    #[test]
    fn a_listing_is_read() {
        let listed = read_listing(TWO).expect("two");
        assert_eq!((listed.len(), listed[1].free), (2, ByteCount::gib(1)));
        assert!(listed[0].has_driver());
        assert!(!Gpu { driver: "460.32.03".to_owned(), ..listed[0].clone() }.has_driver());
        for wrong in ["", "\n", "No devices were found", "0, GPU-a, H100, 580, [N/A], [N/A]"] {
            assert!(read_listing(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_gpu_is_the_one_that_workers_see() {
        let index = |visible, ordinal| gpus(visible).find(ordinal).map(|gpu| gpu.index);
        assert_eq!(index(None, 1), Ok(1));
        assert_eq!(index(None, 2), Err("nvidia-smi lists 2 GPUs, counted from 0".to_owned()));
        assert_eq!(index(Some("1"), 0), Ok(1));
        assert_eq!(index(Some("1, 0"), 1), Ok(0));
        assert_eq!(index(Some("GPU-bbbb"), 0), Ok(1));
        for (visible, ordinal) in [("1", 1), ("", 0), ("-1", 0), ("MIG-1", 0), ("5", 0)] {
            assert!(index(Some(visible), ordinal).is_err(), "{visible:?}");
        }
    }

    #[test]
    fn what_cannot_be_asked_says_why() {
        assert!(listing(Path::new("/nowhere/nvidia-smi")).expect_err("none").contains("cannot be run"));
        assert!(listing(Path::new("/bin/false")).expect_err("fails").contains("ended with"));
    }
}
