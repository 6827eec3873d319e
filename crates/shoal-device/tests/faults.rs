//! Faults: each verb failing in turn, errors of Drop, and what is leaked on purpose.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;
use shoal_device::device::Verb;
use shoal_device::sim::LiveObjects;
use shoal_device::{
    Device, DeviceError, ErrorKind, FaultDevice, Frame, HostBuffer, Mapping, Reservation, SimDevice,
    SimOptions, Span, Stream, hash_bytes,
};

const MIB2: ByteCount = ByteCount::mib(2);
const SOON: Duration = Duration::from_secs(20);

struct Bench {
    sim: Arc<SimDevice>,
    faults: Arc<FaultDevice>,
    device: Arc<dyn Device>,
    _dir: tempfile::TempDir,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let sim = SimDevice::open(SimOptions::new(ByteCount::mib(16), dir.path())).unwrap();
    let faults = FaultDevice::new(Arc::clone(&sim) as _);
    Bench { sim, device: Arc::clone(&faults) as _, faults, _dir: dir }
}

/// Up, hash, down, by every object of the owned layer. Waits for its work even when a step fails.
fn round_trip(device: &Arc<dyn Device>) -> Result<(), DeviceError> {
    let reservation = Reservation::new(device, MIB2)?;
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, Frame::create(device, MIB2)?)?;
    let buffer = HostBuffer::allocate(device, MIB2)?;
    let bytes = vec![0xA5; 2 << 20];
    buffer.write(ByteCount::ZERO, &bytes)?;
    let (first, second) = (Stream::create(device)?, Stream::create(device)?);
    first.copy(Span::host(&buffer, ByteCount::ZERO, MIB2), Span::mapping(&mapping))?;
    second.wait_for(&first.record()?)?;
    assert_eq!(second.hash(Span::mapping(&mapping))?.wait(SOON)?, hash_bytes(&bytes));
    second.zero(&mapping)?;
    let blocks = |back: bool| {
        let block = |index: u64| {
            let (offset, bytes) = (ByteCount(index * 8192), ByteCount(4096));
            let host = Span::host(&buffer, offset, bytes);
            let on_device = Span::Device { mapping: Arc::clone(&mapping), offset, bytes };
            if back { (on_device, host) } else { (host, on_device) }
        };
        (0..64).map(block).collect::<Vec<_>>()
    };
    second.copy_many(&blocks(false))?;
    second.copy_many(&blocks(true))?;
    second.launch_host(Arc::clone(&mapping), || ())?;
    assert!(second.synchronize(SOON)?);
    device.memory().map(|_| ())
}

/// Jobs of closed streams may still hold objects; gives them the time to end.
fn settle(sim: &SimDevice, expected: LiveObjects) -> LiveObjects {
    for _ in 0..1000 {
        if sim.live_objects() == expected {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    sim.live_objects()
}

/// What is left of a round trip in which this verb of teardown failed once.
fn left_by(verb: Verb) -> LiveObjects {
    match verb {
        // A mapping that may still be there takes its parents with it.
        Verb::Unmap => LiveObjects { reservations: 1, frames: 1, mappings: 1, ..Default::default() },
        Verb::Release => LiveObjects { reservations: 1, ..Default::default() },
        Verb::DestroyFrame => LiveObjects { frames: 1, ..Default::default() },
        Verb::FreeHost => LiveObjects { host_buffers: 1, ..Default::default() },
        Verb::DestroyStream => LiveObjects { streams: 1, ..Default::default() },
        _ => LiveObjects { events: 1, ..Default::default() },
    }
}

#[test]
fn every_call_failing_in_turn_leaks_nothing_but_what_could_not_be_given_back() {
    let calls = {
        let bench = bench();
        round_trip(&bench.device).unwrap();
        assert_eq!(settle(&bench.sim, LiveObjects::default()), LiveObjects::default());
        bench.faults.calls()
    };
    assert!(calls > 20, "{calls}");
    for n in 1..=calls {
        let bench = bench();
        bench.faults.fail_nth(n);
        let outcome = round_trip(&bench.device);
        let failed = bench.faults.history()[usize::try_from(n).unwrap() - 1];
        if failed.verb.is_teardown() {
            // The work is done; the object that could not be given back is leaked, and the device knows.
            outcome.unwrap();
            let expected = left_by(failed.verb);
            assert_eq!(settle(&bench.sim, expected), expected, "call {n} {failed:?}");
            let errors = bench.device.take_errors();
            assert!(
                matches!(errors.as_slice(), [DeviceError::Leaked { cause, .. }]
                    if **cause == DeviceError::Injected { call: n, verb: failed.verb }),
                "call {n} {failed:?}: {errors:?}"
            );
            assert_eq!(errors[0].kind(), ErrorKind::Injected);
        } else {
            // Memory that may not be locked is used unlocked.
            let expected = match failed.verb {
                Verb::LockHost => Ok(()),
                verb => Err(DeviceError::Injected { call: n, verb }),
            };
            assert_eq!(outcome, expected);
            assert_eq!(
                settle(&bench.sim, LiveObjects::default()),
                LiveObjects::default(),
                "call {n} {failed:?}"
            );
            assert_eq!(bench.device.take_errors(), []);
        }
        assert_eq!(bench.faults.injected(), 1);
    }
}

#[test]
fn a_failed_unmap_keeps_the_memory_and_the_address() {
    let bench = bench();
    let reservation = Reservation::new(&bench.device, MIB2).unwrap();
    let frame = Frame::create(&bench.device, MIB2).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, frame).unwrap();
    bench.faults.fail_all(
        Verb::Unmap,
        DeviceError::Driver { call: "cuMemUnmap", code: 700, name: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned() },
    );
    drop((mapping, reservation));
    let errors = bench.device.take_errors();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{}", errors[0]);
    assert_eq!(bench.device.memory().unwrap().used_by_this_process, MIB2);
    assert_eq!(bench.device.take_errors(), [], "an error is told once");
}

#[test]
fn rules_choose_calls_and_errors() {
    let bench = bench();
    let oom = DeviceError::OutOfMemory {
        device: DeviceId(0),
        requested: ByteCount::mib(4),
        free: ByteCount::ZERO,
        capacity: ByteCount::mib(16),
    };
    let told = oom.clone();
    bench
        .faults
        .fail_when(move |call| (call.verb == Verb::CreateFrame && call.bytes > MIB2).then(|| told.clone()));
    assert_eq!(Frame::create(&bench.device, ByteCount::mib(4)).unwrap_err(), oom);
    drop(Frame::create(&bench.device, MIB2).unwrap());
    bench.faults.heal();
    drop(Frame::create(&bench.device, ByteCount::mib(4)).unwrap());
    bench.faults.fail_nth_matching(2, |call| call.verb == Verb::Reserve);
    drop(Reservation::new(&bench.device, MIB2).unwrap());
    assert_eq!(Reservation::new(&bench.device, MIB2).unwrap_err().kind(), ErrorKind::Injected);
    drop(Reservation::new(&bench.device, MIB2).unwrap());
    assert_eq!(settle(&bench.sim, LiveObjects::default()), LiveObjects::default());
}
