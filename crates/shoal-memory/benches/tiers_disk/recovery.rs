//! How long a start takes with a full log of 100 GiB. The log is sparse: headers and footers are real, blocks are holes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use shoal_core::bytes::ByteCount;
use shoal_core::store::format::{
    Entry, NONCE_BYTES, Secret, SegmentHeader, UNIT, UNIT_LEN, write_footer, write_segment_header,
};
use shoal_memory::disk::{DiskOptions, DiskSpec, DiskTier};
use shoal_memory::store::StoreKey;

use super::{key, row};

const SEGMENT: u64 = 256 << 20;
const SEGMENTS: u64 = 400;
const ROUNDS: usize = 3;

pub(crate) fn measure(folder: &Path) {
    for (name, block, unfinished) in
        [("2 MiB", 2 << 20, 0), ("2 MiB, the last one unfinished", 2 << 20, 1), ("128 KiB", 128 << 10, 0)]
    {
        let path = folder.join("recovery");
        let spec = DiskSpec::new(path.clone(), ByteCount(SEGMENTS * SEGMENT));
        drop(DiskTier::open(std::slice::from_ref(&spec), DiskOptions::default()).unwrap());
        let blocks = fill(&path, block, SEGMENTS - unfinished);
        let mut seconds = Vec::new();
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            let tier = DiskTier::open(std::slice::from_ref(&spec), DiskOptions::default()).unwrap();
            seconds.push(begun.elapsed().as_secs_f64());
            let recovered = tier.usage()[0].recovered;
            println!("# {recovered:?}");
            assert_eq!(recovered.blocks, blocks);
            assert_eq!(u64::from(recovered.scanned), unfinished);
        }
        row(&format!("start with 100 GiB, blocks of {name}"), "time", "s", &seconds, None, Some(10.0));
        fs::remove_dir_all(path).unwrap();
    }
}

/// Writes headers to all segments and footers to the first so many. How many blocks they name.
fn fill(path: &Path, block: u32, sealed: u64) -> u64 {
    let marker: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("tier.json")).unwrap()).unwrap();
    let secret = Secret(u128::from_str_radix(marker["secret"].as_str().unwrap(), 16).unwrap());
    let log: File = OpenOptions::new().write(true).open(path.join("log")).unwrap();
    log.set_len(SEGMENTS * SEGMENT).unwrap();
    let mut blocks = 0;
    for slot in 0..SEGMENTS {
        let header = SegmentHeader { seq: slot + 1, stamp: slot + 1000 };
        let mut unit = [0; UNIT_LEN];
        write_segment_header(secret, header, SEGMENT, &mut unit);
        log.write_all_at(&unit, slot * SEGMENT).unwrap();
        if slot >= sealed {
            continue;
        }
        let count = (SEGMENT - (2 << 20)) / (u64::from(block) + UNIT);
        let entry = |at: u64| {
            let key: StoreKey = key(slot * 1_000_000 + at);
            let offset = UNIT + at * (u64::from(block) + UNIT) + UNIT;
            Entry { key, offset, bytes: block, checksum: 1, nonce: [0; NONCE_BYTES] }
        };
        let entries: Vec<Entry> = (0..count).map(entry).collect();
        let footer = write_footer(secret, header.stamp, &entries);
        log.write_all_at(&footer, (slot + 1) * SEGMENT - footer.len() as u64).unwrap();
        blocks += count;
    }
    log.sync_all().unwrap();
    blocks
}
