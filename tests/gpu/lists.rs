//! Lists of copies on a GPU: every way of copying for every size, the table of costs, and a small run for sanitizers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::copy_plan::costs::{CopyCosts, Costs, Method};
use shoal_device::conformance::CASES;
use shoal_device::{CudaDevice, Device, HostBuffer, Span, Stream, hash_bytes};

use super::{SOON, as_dyn, gpu, host, mapped, pattern};

fn open_with(method: Method) -> Arc<dyn Device> {
    let device = CudaDevice::open(0).unwrap();
    device.set_copy_costs(CopyCosts::new(Costs::only(method), Costs::only(method)));
    device
}

/// What the table would never choose must be right too: another device's table may.
#[test]
fn every_way_of_copying_is_exact() {
    let Some(cuda) = gpu() else { return };
    for method in Method::ALL {
        if method == Method::Batch && cuda.copy_costs().up.batch.is_none() {
            eprintln!("this driver takes no batches");
            continue;
        }
        for (name, case) in CASES.iter().filter(|(name, _)| name.contains("lists")) {
            let start = Instant::now();
            case(&|| open_with(method));
            eprintln!("case {name} passed by {method:?} in {:?}", start.elapsed());
        }
    }
}

#[test]
fn what_copies_cost_is_known_soon_and_kept() {
    let Some(first) = gpu() else { return };
    let start = Instant::now();
    let measured = first.copy_costs();
    let took = start.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    let second = gpu().unwrap();
    let start = Instant::now();
    let read = second.copy_costs();
    let took_again = start.elapsed();
    eprintln!("measured or read in {took:?}, then in {took_again:?}");
    // Where the first one could be kept: a machine without a home measures each time.
    if took_again < Duration::from_millis(5) {
        assert_eq!(measured, read);
    }
    assert!(measured.up.kernel.is_some() && measured.down.kernel.is_some(), "a kernel reaches the host here");
}

/// A few MiB by each kernel and each way of copying, as `tests/gpu/run.sh sanitizer` runs it.
#[test]
fn a_small_run_of_every_kernel() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let bytes = ByteCount::mib(4);
    let expected = pattern(77, bytes);
    let (mapping, source) = (mapped(&device, bytes), host(&device, &expected));
    let back = HostBuffer::allocate(&device, bytes).unwrap();
    let stream = Stream::create(&device).unwrap();
    let block = |buffer: &Arc<HostBuffer>, place: u64, bytes: u64, is_up: bool| {
        let host = Span::host(buffer, ByteCount(place), ByteCount(bytes));
        let (mapping, offset) = (Arc::clone(&mapping), ByteCount(place));
        let on_device = Span::Device { mapping, offset, bytes: ByteCount(bytes) };
        if is_up { (host, on_device) } else { (on_device, host) }
    };
    for method in Method::ALL {
        cuda.set_copy_costs(CopyCosts::new(Costs::only(method), Costs::only(method)));
        for (step, length) in [(4096, 4096), (4096, 4000), (65_536, 65_535), (1 << 20, 1 << 20), (512, 33)] {
            let places = || (0..(bytes.0 / step).min(300)).map(move |index| index * step);
            // Lengths that are no multiple of anything, at places that are.
            let up: Vec<_> = places().map(|place| block(&source, place, length, true)).collect();
            let down: Vec<_> = places().map(|place| block(&back, place, length, false)).collect();
            stream.copy_many(&up).unwrap();
            stream.copy_many(&down).unwrap();
            assert!(stream.synchronize(SOON).unwrap());
            let came = back.access(ByteCount::ZERO, bytes, <[u8]>::to_vec).unwrap();
            for place in places() {
                let (from, to) = (usize::try_from(place).unwrap(), usize::try_from(place + length).unwrap());
                assert!(came[from..to] == expected[from..to], "{method:?}, {length} at {place}");
            }
        }
    }
    stream.copy(Span::host(&source, ByteCount::ZERO, bytes), Span::mapping(&mapping)).unwrap();
    let hash = stream.hash(Span::mapping(&mapping)).unwrap();
    let part =
        Span::Device { mapping: Arc::clone(&mapping), offset: ByteCount(13), bytes: ByteCount(70_001) };
    let of_part = stream.hash(part).unwrap();
    assert_eq!(hash.wait(SOON).unwrap(), hash_bytes(&expected));
    assert_eq!(of_part.wait(SOON).unwrap(), hash_bytes(&expected[13..70_014]));
}
