//! The simulated device, seen from outside: who is in its ledger and lives.

use std::path::PathBuf;

use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};

use super::{Gauge, GaugeError};
use crate::sim::holders;

/// Reads one simulated device. It need not have been opened by anybody yet.
#[derive(Clone, Debug)]
pub struct SimGauge {
    runtime_dir: PathBuf,
    ordinal: u32,
    capacity: ByteCount,
}

impl SimGauge {
    /// Looks at device `ordinal` of the processes that meet in `runtime_dir`; its `capacity` is what they agreed on.
    #[must_use]
    pub fn new(runtime_dir: impl Into<PathBuf>, ordinal: u32, capacity: ByteCount) -> Self {
        Self { runtime_dir: runtime_dir.into(), ordinal, capacity }
    }
}

impl Gauge for SimGauge {
    fn source(&self) -> String {
        "the simulated device's ledger".to_owned()
    }

    fn read(&mut self) -> Result<Reading, GaugeError> {
        let mut processes: Vec<ProcessReading> = Vec::new();
        // A process may have it open several times.
        for holder in holders(&self.runtime_dir, self.ordinal)? {
            match processes.iter_mut().find(|known| known.process == holder.process) {
                Some(known) => known.bytes = known.bytes.map(|bytes| bytes + holder.bytes),
                None => {
                    processes.push(ProcessReading { process: holder.process, bytes: Some(holder.bytes) });
                }
            }
        }
        let used: ByteCount = processes.iter().filter_map(|process| process.bytes).sum();
        Ok(Reading { total: self.capacity, free: self.capacity.saturating_sub(used), processes })
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::bytes::ByteCount;

    use super::*;
    use crate::device::Device;
    use crate::sim::{SimDevice, SimOptions};

    #[test]
    fn all_that_a_process_has_is_read_while_it_lives() {
        let scratch = tempfile::tempdir().expect("a directory");
        let capacity = ByteCount::mib(64);
        let mut gauge = SimGauge::new(scratch.path(), 0, capacity);
        let none = Reading { total: capacity, free: capacity, processes: vec![] };
        assert_eq!(gauge.read().expect("nobody has opened it"), none);
        let open = || SimDevice::open(SimOptions::new(capacity, scratch.path())).expect("a device");
        let (one, other) = (open(), open());
        let frames = [one.create_frame(ByteCount::mib(4)), other.create_frame(ByteCount::mib(8))];
        let [first, second] = frames.map(|frame| frame.expect("room"));
        let read = gauge.read().expect("it is there");
        let here = ProcessReading { process: std::process::id(), bytes: Some(ByteCount::mib(12)) };
        assert_eq!((read.free, read.processes), (ByteCount::mib(52), vec![here]));
        one.destroy_frame(first).expect("ours");
        other.destroy_frame(second).expect("ours");
        drop((one, other));
        assert_eq!(gauge.read().expect("nobody has it open"), none);
    }
}
