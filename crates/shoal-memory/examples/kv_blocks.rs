//! KV blocks from Rust, without Python: what an engine does with them, on the simulated device.
//!
//! ```text
//! cargo run -p shoal-memory --example kv_blocks
//! ```
#![expect(clippy::print_stdout, reason = "it shows what it does")]

use std::error::Error;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_device::{SimDevice, SimOptions};
use shoal_memory::{KvCacheSpec, LocalBudget, ManagerOptions, MemoryManager};

const BLOCK_TOKENS: u32 = 16;
const WAIT: Duration = Duration::from_secs(30);

/// Runs it all; an error is a failed example.
///
/// # Errors
/// What the device or the cache refused.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    // A device of 512 MiB. On a GPU: `CudaDevice::open_dyn(0)`.
    let directory = tempfile::tempdir()?;
    let device = SimDevice::open_dyn(SimOptions::new(ByteCount::mib(512), directory.path()))?;
    let budget = LocalBudget::new(ByteCount::mib(512));
    let manager = MemoryManager::new(device, ManagerOptions::new(ByteCount::mib(512), budget))?;

    // 32 layers of 8 heads of 128 in bfloat16: 2 MiB a block. No memory yet.
    let heads = BlockShape::Attention { tokens: BLOCK_TOKENS, kv_heads: 8, head_dim: 128, window: None };
    let group = GroupSpec { name: "full".to_owned(), layers: 32, shape: heads, element_bytes: 2 };
    let cache = manager.kv_cache(KvCacheSpec::new(
        "kv",
        CacheSpec {
            groups: vec![group],
            order: PlaneOrder::BlockMajor,
            bytes: ByteCount::mib(256),
            granule_bytes_max: ByteCount::mib(64),
        },
    ))?;
    println!("{} blocks of {}", cache.layout(0)?.blocks(), cache.layout(0)?.block_bytes());

    // As many ids as the buffer takes, each with memory, or false: not now, and nothing has changed.
    let prompt: Vec<u32> = (0..100).collect();
    let mut ids = vec![0_u32; prompt.len().div_ceil(BLOCK_TOKENS as usize)];
    if !cache.alloc(0, &mut ids)? {
        return Err("no memory for the prompt now".into());
    }
    // A step: inside a guard what is allocated is there, and stays.
    {
        let _guard = manager.guard(WAIT)?;
        for (at, id) in ids.iter().enumerate() {
            for (offset, _) in cache.layout(0)?.pieces(*id) {
                cache.region().write(offset, &[u8::try_from(at)?; 64])?;
            }
        }
    }

    // The full blocks can be found by their tokens, for this tenant; then the request ends.
    let sealed = cache.seal(Start::Salt(b"tenant a"), &prompt, &[&ids])?;
    cache.free(0, &ids)?;
    println!("{} blocks are sealed; {:?}", sealed.blocks, cache.usage());

    // The next prompt begins alike: its prefix is there, and is its own too.
    let mut found = Found::default();
    cache.find(b"tenant a", &prompt[..prompt.len() - 1], &mut found)?;
    if (found.tokens, &found.groups[0].blocks[..]) != (96, &ids[..6]) {
        return Err(format!("found {found:?}").into());
    }
    {
        let _guard = manager.guard(WAIT)?;
        let (mut read, fifth) = ([0; 64], found.groups[0].blocks[5]);
        let (offset, _) = cache.layout(0)?.pieces(fifth).next().ok_or("a block has a piece")?;
        cache.region().read(offset, &mut read)?;
        if read != [5; 64] {
            return Err("the block does not hold what was written".into());
        }
    }
    let mut stranger = Found::default();
    cache.find(b"tenant b", &prompt, &mut stranger)?;
    if stranger.tokens != 0 {
        return Err("another tenant found it".into());
    }

    // Less memory from now on: what is only cached goes first. Blocks are moved together if the engine says so, and the
    // moves tell where each went.
    cache.set_limit(ByteCount::mib(32), None)?;
    for moved in cache.compact(0, usize::MAX, WAIT)? {
        for id in &mut found.groups[0].blocks {
            if *id == moved.from {
                *id = moved.to;
            }
        }
    }
    cache.free(0, &found.groups[0].blocks)?;
    let mut many = vec![0_u32; 17];
    if cache.alloc(0, &mut many)? {
        return Err("34 MiB under a limit of 32".into());
    }
    let usage = cache.usage();
    println!("mapped {} under a limit of {}", usage.mapped, usage.limit);

    // Everything goes back.
    cache.forget_all()?;
    cache.trim(ByteCount(u64::MAX))?;
    drop(cache);
    if manager.usage().kv_device != ByteCount::ZERO {
        return Err("memory is left".into());
    }
    Ok(())
}
