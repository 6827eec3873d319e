//! What torch's allocator calls: two C functions, exported from this library.
//!
//! torch gives an allocator no word of its own to tell pools apart, and a thread-local would be wrong where backward
//! threads allocate inside a capture. So there is one `alloc` for each of [`SLOTS`] slots, and a region has a slot while
//! its pools live; `free` finds the region by the address. Torch holds its own lock, and perhaps the GIL, when it calls:
//! nothing here takes the GIL or calls torch, no panic leaves, and a failure is a null pointer, which torch turns into its
//! own out-of-memory error; why is kept as the region's last error.

#![expect(unsafe_code, reason = "exported to C, and vouches for torch's streams")]

mod exports;

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::Arc;
use std::thread;

use parking_lot::RwLock;
use shoal_core::bytes::ByteCount;
use shoal_device::device::ForeignStream;
use shoal_device::{DeviceKind, VirtAddr};
use shoal_memory::Segments;

/// Regions that torch may fill at once in one process.
pub(crate) const SLOTS: usize = 64;

/// A region that torch may hold segments of.
struct Known {
    segments: Arc<Segments>,
    owner: u32,
    slot: Option<usize>,
}

/// By the region's first address.
static KNOWN: RwLock<BTreeMap<u64, Known>> = RwLock::new(BTreeMap::new());

/// Gives a region a slot; the one it has, if it has one. `None`: all are taken.
pub(crate) fn bind(segments: &Arc<Segments>) -> Option<usize> {
    let (at, owner) = (segments.region().address(), process::id());
    let mut known = KNOWN.write();
    if let Some(slot) = known.get(&at).and_then(|one| one.slot) {
        return Some(slot);
    }
    let slot = (0..SLOTS).find(|slot| known.values().all(|one| one.slot != Some(*slot)))?;
    known.insert(at, Known { segments: Arc::clone(segments), owner, slot: Some(slot) });
    Some(slot)
}

/// Takes a region's slot back. It stays known while torch has segments of it.
pub(crate) fn unbind(segments: &Arc<Segments>) {
    let forgotten = {
        let mut known = KNOWN.write();
        let at = segments.region().address();
        if let Some(one) = known.get_mut(&at) {
            one.slot = None;
        }
        if segments.is_empty() { known.remove(&at) } else { None }
    };
    drop(forgotten);
}

/// A stream of torch's, by what `Stream.cuda_stream` says (0: the default stream).
pub(crate) fn stream_of(handle: u64) -> ForeignStream {
    // SAFETY: torch's streams live as long as the process; the Python package's words ask for no other.
    unsafe { ForeignStream::new(handle) }
}

fn allocate(slot: usize, size: isize, device: c_int, stream: *mut c_void) -> *mut c_void {
    let segments = {
        let known = KNOWN.read();
        let found = known.values().find(|one| one.slot == Some(slot) && one.owner == process::id());
        found.map(|one| Arc::clone(&one.segments))
    };
    let (Some(segments), Ok(bytes)) = (segments, u64::try_from(size)) else { return std::ptr::null_mut() };
    let info = segments.region().manager().device().info();
    if info.kind == DeviceKind::Cuda && i64::from(device) != i64::from(info.id.0) {
        let region = segments.region().name().to_owned();
        let (doing, why) = ("allocate", "torch asked for memory of another device");
        segments.set_last_error(shoal_memory::MemoryError::State { region, doing, why });
        return std::ptr::null_mut();
    }
    match segments.allocate(ByteCount(bytes), Some(stream_of(stream.addr() as u64))) {
        Ok(at) => usize::try_from(at.0).map_or(std::ptr::null_mut(), std::ptr::with_exposed_provenance_mut),
        Err(_) => std::ptr::null_mut(),
    }
}

fn free(at: *mut c_void, stream: *mut c_void) {
    let at = VirtAddr(at.addr() as u64);
    let found = {
        let known = KNOWN.read();
        let below = known.range(..=at.0).next_back().map(|(_, one)| one);
        below
            .filter(|one| one.owner == process::id() && one.segments.contains(at))
            .map(|one| Arc::clone(&one.segments))
    };
    let Some(segments) = found else { return };
    let stream = stream_of(stream.addr() as u64);
    // Its failure is kept by the region; torch has no way to hear of it.
    let _ = segments.free(at, Some(stream));
    if segments.is_empty() {
        let mut known = KNOWN.write();
        let first = segments.region().address();
        let forgotten =
            if known.get(&first).is_some_and(|one| one.slot.is_none()) { known.remove(&first) } else { None };
        drop(known);
        if let Some(forgotten) = forgotten {
            // The last of a region may wait for kernels, which torch must not.
            let gone = thread::Builder::new().name("shoal-torch-drop".to_owned());
            // Without a thread for it, it ends here.
            let _ = gone.spawn(move || drop((forgotten, segments)));
        }
    }
}

extern "C" fn alloc_in<const SLOT: usize>(size: isize, device: c_int, stream: *mut c_void) -> *mut c_void {
    catch_unwind(AssertUnwindSafe(|| allocate(SLOT, size, device, stream))).unwrap_or(std::ptr::null_mut())
}

/// torch's `free`, for every region. The size and the device are the region's to know.
#[unsafe(no_mangle)]
extern "C" fn shoal_torch_free(at: *mut c_void, _size: isize, _device: c_int, stream: *mut c_void) {
    // A panic has nobody to go to.
    let _ = catch_unwind(AssertUnwindSafe(|| free(at, stream)));
}
