//! The suite on the simulated device, alone and behind the fault wrapper; and what keeps the suite honest.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use shoal_core::bytes::ByteCount;
use shoal_device::conformance::{CASES, run};
use shoal_device::{Device, FaultDevice, SimDevice, SimOptions};

fn open(dir: &tempfile::TempDir) -> Arc<dyn Device> {
    SimDevice::open_dyn(SimOptions::new(ByteCount::mib(128), dir.path())).unwrap()
}

#[test]
fn the_simulated_device_conforms() {
    let dir = tempfile::tempdir().unwrap();
    for (name, case) in CASES {
        eprintln!("{name}");
        case(&|| open(&dir));
    }
}

#[test]
fn a_wrapper_without_faults_conforms_too() {
    let dir = tempfile::tempdir().unwrap();
    run(|| FaultDevice::new(open(&dir)) as Arc<dyn Device>);
}

#[test]
fn a_limited_link_conforms_too() {
    let dir = tempfile::tempdir().unwrap();
    run(|| {
        let mut options = SimOptions::new(ByteCount::mib(128), dir.path());
        options.copy_bandwidth = Some(ByteCount::gib(1));
        SimDevice::open_dyn(options).unwrap()
    });
}
