//! What the measuring programs share: sizes, the link, regions with bytes in them.

use std::env;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::{
    CudaDevice, Device, DeviceError, FaultDevice, Frame, HostBuffer, Mapping, Reservation, SimDevice,
    SimOptions, Span, Stream,
};
use shoal_memory::{Backing, LocalBudget, ManagerOptions, MemoryManager, Region, RegionSpec};

use crate::report::{Bounds, Report, Samples};

pub(crate) const LONG: Duration = Duration::from_mins(1);
pub(crate) const PIECE: ByteCount = ByteCount::mib(256);
pub(crate) const ROUNDS: usize = 5;

/// 13 GiB, or what `$SHOAL_BENCH_GIB` says.
pub(crate) fn size() -> ByteCount {
    let gib = env::var("SHOAL_BENCH_GIB").ok().and_then(|text| text.parse().ok());
    ByteCount::gib(gib.unwrap_or(13))
}

pub(crate) fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

pub(crate) fn rate(bytes: ByteCount, ms: f64) -> f64 {
    bytes.0 as f64 / 1e6 / ms
}

fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; usize::try_from(PIECE.0).unwrap()];
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes
}

/// GB/s of the link.
pub(crate) struct Link {
    pub(crate) up: f64,
    pub(crate) down: f64,
    pub(crate) both: f64,
}

/// All of it at once, from memory made as the regions' is: up, down, and both ways.
pub(crate) fn link(report: &mut Report, device: &Arc<dyn Device>) -> Link {
    let count = size().0 / PIECE.0;
    let reservation = Reservation::new(device, ByteCount(2 * size().0)).unwrap();
    let place = |index| {
        let frame = Frame::create(device, PIECE).unwrap();
        Mapping::new(&reservation, ByteCount(PIECE.0 * index), frame).unwrap()
    };
    let mappings: Vec<_> = (0..2 * count).map(place).collect();
    let start = Instant::now();
    let buffers: Vec<_> = (0..2 * count).map(|_| HostBuffer::allocate(device, PIECE).unwrap()).collect();
    println!("host memory for the link: {:.1} ms", ms(start));
    let (up, down) = (Stream::create(device).unwrap(), Stream::create(device).unwrap());
    let host = |index: u64| Span::host(&buffers[usize::try_from(index).unwrap()], ByteCount::ZERO, PIECE);
    let on_device = |index: u64| Span::mapping(&mappings[usize::try_from(index).unwrap()]);
    let measure = |is_up: bool, is_down: bool| {
        // The first round wakes the clocks and touches everything; it is no ceiling.
        let values: Vec<f64> = (0..=ROUNDS)
            .map(|_| {
                let start = Instant::now();
                for index in 0..count {
                    if is_up {
                        up.copy(host(index), on_device(index)).unwrap();
                    }
                    if is_down {
                        down.copy(on_device(count + index), host(count + index)).unwrap();
                    }
                }
                assert!(up.synchronize(LONG).unwrap() && down.synchronize(LONG).unwrap());
                let directions = u64::from(is_up) + u64::from(is_down);
                rate(ByteCount(directions * size().0), ms(start))
            })
            .skip(1)
            .collect();
        values
    };
    let (rate_up, rate_down, rate_both) = (measure(true, false), measure(false, true), measure(true, true));
    let medians = [&rate_up, &rate_down, &rate_both].map(|values| Samples::new(values.clone()).median());
    report.add("link, host to device", "GB/s", rate_up, Bounds::default());
    report.add("link, device to host", "GB/s", rate_down, Bounds::default());
    report.add("link, both ways at once, sum", "GB/s", rate_both, Bounds::default());
    let [up, down, both] = medians;
    Link { up, down, both }
}

pub(crate) struct World {
    pub(crate) faults: Arc<FaultDevice>,
    pub(crate) manager: Arc<MemoryManager>,
}

impl World {
    pub(crate) fn new(device: &Arc<dyn Device>, budget: ByteCount) -> Self {
        let faults = FaultDevice::new(Arc::clone(device));
        let lease = LocalBudget::new(budget);
        let options = ManagerOptions::new(ByteCount(4 * size().0), lease as _);
        let manager = MemoryManager::new(Arc::clone(&faults) as _, options).unwrap();
        Self { faults, manager }
    }

    pub(crate) fn region(&self, name: &str) -> Region {
        let spec = RegionSpec {
            name: name.to_owned(),
            bytes: size(),
            kind: LeaseKind::Weights,
            extent_rule: ExtentRule::default(),
            backing: Backing::Keep,
        };
        self.manager.region(spec).unwrap()
    }

    /// Loaded as a file's weights are: to the host, sealed.
    pub(crate) fn staged(&self, name: &str) -> Region {
        let region = self.region(name);
        let bytes = noise(1);
        let start = Instant::now();
        for index in 0..size().0 / PIECE.0 {
            region.stage(ByteCount(index * PIECE.0), &bytes, None).unwrap();
        }
        let staged = ms(start);
        region.seal().unwrap();
        println!("{name}: staged in {staged:.0} ms, sealed in {:.0} ms", ms(start) - staged);
        region
    }
}

/// Places of which at least one lies in every extent.
pub(crate) fn places() -> impl Iterator<Item = ByteCount> {
    (0..64).map(|index| ByteCount(size().0 / 64 * index + 12345))
}

/// Changes some bytes in each extent.
pub(crate) fn write_everywhere(region: &Region, value: u8) {
    places().for_each(|place| region.write(place, &[value, 1, 2, 3]).unwrap());
}

pub(crate) fn wake(region: &Region) -> f64 {
    let start = Instant::now();
    region.wake(LONG).unwrap().wait(LONG).unwrap();
    ms(start)
}

pub(crate) fn sleep(region: &Region, trust_clean: bool) -> f64 {
    let start = Instant::now();
    region.sleep(0.0, trust_clean, LONG).unwrap();
    ms(start)
}

/// A device, and what it is if it is a GPU.
pub(crate) type Found = (Arc<dyn Device>, Option<Arc<CudaDevice>>);

/// The GPU; or with `$SHOAL_BENCH_SIM`, a folder, a simulated device, to try this program.
fn device() -> Result<Found, DeviceError> {
    if let Some(folder) = env::var_os("SHOAL_BENCH_SIM") {
        let device = SimDevice::open_dyn(SimOptions::new(ByteCount(4 * size().0), folder))?;
        return Ok((device, None));
    }
    let cuda = CudaDevice::open(0)?;
    Ok((Arc::clone(&cuda) as _, Some(cuda)))
}

/// The device, or nothing once it is said why there is none.
pub(crate) fn device_or_skip() -> Option<Found> {
    match device() {
        Ok(found) => Some(found),
        Err(error) => {
            println!("skipped: {error}");
            let is_required = env::var_os("SHOAL_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!is_required, "SHOAL_REQUIRE_GPU=1: {error}");
            None
        }
    }
}
