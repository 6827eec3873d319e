//! A stack of the real tiers: memory, a disk, and a directory that several servers share.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::{Device, HostBuffer, SimDevice, SimOptions};
use shoal_memory::disk::{DiskError, DiskOptions, DiskSpec, DiskTier};
use shoal_memory::remote::{RemoteKey, RemoteOptions, RemoteSpec, RemoteTier};
use shoal_memory::store::{
    Aligned, Buffer, Fingerprint, HostOptions, HostTier, Miss, Stack, StackOptions, Store, StoreKey, Stored,
};

const WAIT: Duration = Duration::from_mins(1);
const MIB: usize = 1 << 20;

fn key(block: u128) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(7), tenant: 1, block }
}

fn content(block: u128) -> Vec<u8> {
    (0..MIB as u128).map(|i| (i * 31 + block * 7 + (i >> 9)).to_le_bytes()[0]).collect()
}

/// One server's tiers.
struct Server {
    host: Arc<HostTier>,
    disk: Arc<DiskTier>,
    remote: Arc<RemoteTier>,
    stack: Stack,
}

impl Server {
    fn start(disk: &Path, shared: &Path) -> Self {
        let spec = DiskSpec::new(disk, ByteCount::mib(64));
        let options = DiskOptions { segment_bytes: ByteCount::mib(8), ..DiskOptions::default() };
        let host = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(4))));
        let by = Instant::now() + WAIT;
        // The one before may still be closing on a busy machine.
        let disk = loop {
            match DiskTier::open(std::slice::from_ref(&spec), options.clone()) {
                Err(DiskError::InUse { .. }) if Instant::now() < by => {
                    thread::sleep(Duration::from_millis(1));
                }
                opened => break Arc::new(opened.unwrap()),
            }
        };
        let place = RemoteSpec::Directory(shared.to_owned());
        let options = RemoteOptions { try_deadline: WAIT, ..RemoteOptions::new(RemoteKey([3; 32])) };
        let remote = Arc::new(RemoteTier::open(&place, options).unwrap());
        let tiers: Vec<Arc<dyn Store>> =
            vec![Arc::clone(&host) as _, Arc::clone(&disk) as _, Arc::clone(&remote) as _];
        let stack = Stack::new(tiers, StackOptions::default()).unwrap();
        Self { host, disk, remote, stack }
    }

    fn put(&self, source: Buffer, block: u128) {
        assert_eq!(self.stack.put(key(block), source, MIB, WAIT).wait(), Ok(Stored::Written));
        // The slower tiers go on after the first one has it.
        until("every tier has it in the end", || {
            self.disk.contains(&key(block)) && self.remote.contains(&key(block))
        });
        self.disk.flush(WAIT).wait().unwrap();
    }

    fn get(&self, block: u128) -> Result<bool, Miss> {
        let fetched = self.stack.get(key(block), Buffer::zeroed(MIB), WAIT).wait()?;
        Ok(fetched.as_slice() == content(block))
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let by = Instant::now() + WAIT;
    while !is_so() {
        assert!(Instant::now() < by, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn arena() -> (Arc<HostBuffer>, tempfile::TempDir) {
    let runtime = tempfile::tempdir().unwrap();
    let device: Arc<dyn Device> =
        SimDevice::open(SimOptions::new(ByteCount::mib(64), runtime.path())).unwrap();
    (HostBuffer::allocate(&device, ByteCount::mib(2)).unwrap(), runtime)
}

#[test]
fn a_block_is_found_wherever_it_is_left() {
    let (arena, _runtime) = arena();
    let (one, other, shared) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Server::start(one.path(), shared.path());
    arena.write(ByteCount::ZERO, &content(1)).unwrap();
    first.put(Buffer::Host(arena.view(ByteCount::ZERO, ByteCount::mib(1)).unwrap()), 1);
    assert!(first.host.contains(&key(1)));
    assert_eq!(first.get(1), Ok(true));
    drop(first);

    // Started again: its memory is empty, its disk is not. Read to where it is wanted.
    let again = Server::start(one.path(), shared.path());
    let target = arena.view_mut(ByteCount::mib(1), ByteCount::mib(1)).unwrap();
    let fetched = again.stack.get(key(1), Buffer::HostMut(target), WAIT).wait().unwrap();
    assert!(matches!(fetched.buffer, Buffer::HostMut(_)), "the memory that was given");
    assert!(fetched.as_slice() == content(1));
    drop(fetched);
    let mut found = vec![0; MIB];
    arena.read(ByteCount::mib(1), &mut found).unwrap();
    assert!(found == content(1));
    until("it came up", || again.host.contains(&key(1)) && again.stack.counts().tiers[0].promoted > 0);
    let counts = again.stack.counts();
    assert_eq!([counts.tiers[0].promoted, counts.tiers[1].hits, counts.tiers[2].hits], [1, 1, 0]);

    // Another server finds it where both look.
    let second = Server::start(other.path(), shared.path());
    assert_eq!(second.remote.look(key(1), WAIT).wait(), Ok(true));
    assert_eq!(second.get(1), Ok(true));
    assert_eq!(second.stack.remove(key(1), WAIT).wait(), Ok(true));
    assert_eq!(second.get(1), Err(Miss::Absent));
}

/// All files below.
fn files(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn what_is_damaged_on_one_tier_comes_from_the_next() {
    let (disk, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Server::start(disk.path(), shared.path());
    server.put(Buffer::Own(Aligned::copy_of(&content(1))), 1);
    assert!(server.host.damage(&key(1), 12_345));
    assert_eq!(server.get(1), Ok(true), "from the disk");
    assert_eq!(server.host.usage().corrupt, 1);
    drop(server);

    // One bit of the block is another.
    let log = disk.path().join("log");
    let mut bytes = fs::read(&log).unwrap();
    let (start, wanted) = (content(1), bytes.chunks(4096).map(<[u8]>::to_vec));
    let unit = wanted.into_iter().position(|unit| unit == start[4096..8192]).unwrap();
    bytes[unit * 4096] ^= 1;
    fs::write(&log, bytes).unwrap();
    let server = Server::start(disk.path(), shared.path());
    assert!(server.disk.contains(&key(1)), "its footer is right");
    assert_eq!(server.remote.look(key(1), WAIT).wait(), Ok(true));
    assert_eq!(server.get(1), Ok(true), "from the directory");
    assert_eq!(server.disk.usage()[0].counts.corrupt, 1);
    assert_eq!(server.stack.counts().tiers[1].missed, 1);
    drop(server);

    let object = files(shared.path()).pop().unwrap();
    let mut bytes = fs::read(&object).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&object, bytes).unwrap();
    let fresh = tempfile::tempdir().unwrap();
    let server = Server::start(fresh.path(), shared.path());
    assert_eq!(server.remote.look(key(1), WAIT).wait(), Ok(true));
    assert_eq!(server.get(1), Err(Miss::Corrupt), "nobody has the right bytes");
}
