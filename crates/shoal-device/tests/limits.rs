//! The limits of the machine: each is an error with its remedy, and never a signal.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_device::{
    Device, DeviceError, ErrorKind, Frame, HostBuffer, Mapping, Reservation, SimDevice, SimOptions, Span,
    Stream,
};

fn open(dir: &tempfile::TempDir, capacity: ByteCount) -> Arc<dyn Device> {
    SimDevice::open_dyn(SimOptions::new(capacity, dir.path())).unwrap()
}

#[test]
fn more_than_the_machine_has_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let device = open(&dir, ByteCount(1 << 52));
    let huge = ByteCount(1 << 50);
    let short = device.create_frame(huge).unwrap_err();
    assert!(matches!(short, DeviceError::HostMemory { requested, .. } if requested == huge), "{short}");
    assert!(short.to_string().contains("device_budget"), "no remedy: {short}");
    assert_eq!(short.kind(), ErrorKind::Exhausted, "evicting would not help");
    assert_eq!(device.memory().unwrap().used_by_this_process, ByteCount::ZERO, "still charged");
    let short = HostBuffer::allocate(&device, huge).unwrap_err();
    assert!(matches!(short, DeviceError::HostMemory { .. }), "{short}");
    for bytes in [ByteCount(1 << 60), ByteCount(u64::MAX - (2 << 20) + 1)] {
        let short = device.reserve(bytes).unwrap_err();
        assert!(matches!(short, DeviceError::AddressSpace { .. }), "{short}");
        assert_eq!(short.kind(), ErrorKind::Exhausted);
    }
    assert!(HostBuffer::allocate(&device, ByteCount(u64::MAX)).is_err());
}

#[test]
fn too_many_mappings_is_an_error_and_all_of_them_can_still_be_unmapped() {
    let limit: u64 = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if limit > 300_000 {
        eprintln!("vm.max_map_count is {limit}: not tried, it would take long");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = open(&dir, ByteCount::mib(16));
    let reservation = Reservation::new(&device, ByteCount(PAGE_BYTES.0 * limit * 2)).unwrap();
    let frame = Frame::create(&device, PAGE_BYTES).unwrap();
    // Every other page: the most mappings of the kernel for one of ours.
    let mut mappings = Vec::new();
    let refused = loop {
        let offset = ByteCount(PAGE_BYTES.0 * 2 * mappings.len() as u64);
        match Mapping::new(&reservation, offset, Arc::clone(&frame)) {
            Ok(mapping) => mappings.push(mapping),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, DeviceError::MapLimit { .. }), "{refused}");
    assert!(refused.to_string().contains("sysctl -w vm.max_map_count="), "no remedy: {refused}");
    assert!(mappings.len() as u64 > limit / 4, "{} mappings of {limit}", mappings.len());
    drop(mappings);
    assert_eq!(device.take_errors(), []);
}

#[test]
fn a_limited_link_takes_its_time_in_each_direction_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = SimOptions::new(ByteCount::mib(64), dir.path());
    options.copy_bandwidth = Some(ByteCount::mib(100));
    let device = SimDevice::open_dyn(options).unwrap();
    let bytes = ByteCount::mib(16);
    let host = HostBuffer::allocate(&device, ByteCount::mib(32)).unwrap();
    let ends: Vec<_> = (0..2)
        .map(|_| {
            let reservation = Reservation::new(&device, bytes).unwrap();
            let frame = Frame::create(&device, bytes).unwrap();
            let mapping = Mapping::new(&reservation, ByteCount::ZERO, frame).unwrap();
            (Stream::create(&device).unwrap(), mapping)
        })
        .collect();
    let started = Instant::now();
    ends[0].0.copy(Span::host(&host, ByteCount::ZERO, bytes), Span::mapping(&ends[0].1)).unwrap();
    ends[1].0.copy(Span::mapping(&ends[1].1), Span::host(&host, bytes, bytes)).unwrap();
    for (stream, _) in &ends {
        assert!(stream.synchronize(Duration::from_secs(20)).unwrap());
    }
    // 0.16 s each, at the same time; only the lower bound is sure on a busy machine.
    assert!(started.elapsed() >= Duration::from_millis(155), "{:?}", started.elapsed());
    let (stream, mapping) = &ends[0];
    let started = Instant::now();
    for _ in 0..2 {
        stream.copy(Span::host(&host, ByteCount::ZERO, bytes), Span::mapping(mapping)).unwrap();
    }
    assert!(stream.synchronize(Duration::from_secs(20)).unwrap());
    assert!(
        started.elapsed() >= Duration::from_millis(280),
        "one direction is shared: {:?}",
        started.elapsed()
    );
}
