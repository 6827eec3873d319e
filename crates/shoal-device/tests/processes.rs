//! What only another process can show: a touch that kills, a share that returns, a fork that is refused.
//!
//! Each test starts this test binary again, with the part to play in an environment variable.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test whose children answer on stdout")]
#![expect(unsafe_code, reason = "touches memory that must fault, and forks")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, ptr, thread};

use shoal_core::bytes::ByteCount;
use shoal_device::sim::holders;
use shoal_device::{
    Device, DeviceError, ErrorKind, Frame, HostBuffer, Mapping, Reservation, SimDevice, SimOptions, Span,
    Stream,
};

const PART: &str = "SHOAL_TEST_PART";
const DIR: &str = "SHOAL_TEST_DIR";
const CAPACITY: ByteCount = ByteCount::mib(64);
const MIB2: ByteCount = ByteCount::mib(2);

fn open(dir: &Path) -> Arc<dyn Device> {
    SimDevice::open_dyn(SimOptions::new(CAPACITY, dir)).unwrap()
}

/// A child of this test that plays `part`.
struct Actor {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Actor {
    fn start(part: &str, dir: &Path) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "play_a_part", "--nocapture", "--test-threads=1"])
            .env(PART, part)
            .env(DIR, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from }
    }

    /// The next line that the part printed (the test harness prints others). Empty when it ended.
    fn hear(&mut self) -> String {
        for line in self.from.by_ref().lines() {
            if let Some((_, said)) = line.unwrap().split_once("said: ") {
                return said.to_owned();
            }
        }
        String::new()
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.to, "{word}").unwrap();
    }

    fn signal(mut self) -> Option<i32> {
        self.child.wait().unwrap().signal()
    }
}

fn say(what: &str) {
    println!("said: {what}");
}

fn listen() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim().to_owned()
}

/// Not a test by itself: the children's entry.
#[test]
fn play_a_part() {
    let Ok(part) = env::var(PART) else { return };
    let dir = PathBuf::from(env::var(DIR).unwrap());
    match part.as_str() {
        "touch-mapped" | "touch-reserved" | "touch-unmapped" => touch(&dir, &part),
        "copy-after-unmap" => copy_after_unmap(&dir),
        "hold" => hold(&dir),
        "fork" => fork_and_try(&dir),
        other => panic!("no such part: {other}"),
    }
}

fn touch(dir: &Path, part: &str) {
    let device = open(dir);
    let reservation = Reservation::new(&device, MIB2).unwrap();
    let at: *mut u8 = ptr::with_exposed_provenance_mut(usize::try_from(reservation.address().0).unwrap());
    let map = || Mapping::new(&reservation, ByteCount::ZERO, Frame::create(&device, MIB2).unwrap()).unwrap();
    let mapping = (part != "touch-reserved").then(map);
    if part == "touch-unmapped" {
        drop(mapping);
        say("unmapped");
        // SAFETY: not safe at all: this must kill the process, and that is the test.
        unsafe { at.write_volatile(1) };
    } else {
        say("before");
        // SAFETY: mapped in one part; in the other this must kill the process, and that is the test.
        unsafe { at.write_volatile(1) };
        say("alive");
    }
}

/// Queues a raw job, unmaps under it (no fence, I5 broken on purpose), then lets the job run.
fn copy_after_unmap(dir: &Path) {
    use shoal_device::device::{HostBacking, RawSpan, Space};
    let device = open(dir);
    let reservation = Reservation::new(&device, MIB2).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, Frame::create(&device, MIB2).unwrap()).unwrap();
    let host = device.allocate_host(MIB2, HostBacking::SmallPages).unwrap();
    let stream = device.create_stream().unwrap();
    let pause = || thread::sleep(Duration::from_millis(200));
    device.launch_host(stream, Box::new(pause), Box::new(())).unwrap();
    let source = RawSpan { space: Space::Host, at: host.0, bytes: MIB2 };
    let target = RawSpan { space: Space::Device, at: mapping.address().0, bytes: MIB2 };
    // SAFETY: the promise is broken on purpose: the fault is the test.
    unsafe { device.copy(stream, source, target, Box::new(())) }.unwrap();
    drop(mapping);
    say("unmapped");
    thread::sleep(Duration::from_secs(20));
}

/// Takes 16 MiB, says so, and goes on taking on request.
fn hold(dir: &Path) {
    let device = open(dir);
    let mut frames = vec![Frame::create(&device, ByteCount::mib(16)).unwrap()];
    say("holding");
    loop {
        match listen().as_str() {
            "take" => match Frame::create(&device, ByteCount::mib(16)) {
                Ok(frame) => {
                    frames.push(frame);
                    say("taken");
                }
                Err(DeviceError::OutOfMemory { free, .. }) => say(&format!("refused, {free} free")),
                Err(error) => panic!("{error}"),
            },
            "drop" => {
                frames.pop();
                say("dropped");
            }
            _ => return,
        }
    }
}

fn fork_and_try(dir: &Path) {
    let device = open(dir);
    let reservation = Reservation::new(&device, MIB2).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, Frame::create(&device, MIB2).unwrap()).unwrap();
    let stream = Stream::create(&device).unwrap();
    let host = HostBuffer::allocate(&device, MIB2).unwrap();
    // SAFETY: the child only makes calls that check the process first, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let is_forked = |error: DeviceError| matches!(error, DeviceError::Forked { .. });
        let mut wrong = 0;
        wrong |= i32::from(!device.memory().is_err_and(is_forked));
        wrong |= i32::from(!device.reserve(MIB2).is_err_and(is_forked)) << 1;
        wrong |= i32::from(!device.create_frame(MIB2).is_err_and(is_forked)) << 2;
        let copied = stream.copy(Span::mapping(&mapping), Span::host(&host, ByteCount::ZERO, MIB2));
        wrong |= i32::from(!copied.is_err_and(is_forked)) << 3;
        wrong |= i32::from(!stream.record().is_err_and(is_forked)) << 4;
        // Dropping in the child must neither hang nor change what the parent has.
        drop((mapping, reservation, host, stream));
        // SAFETY: ends the child at once, without the test harness's exit handlers.
        unsafe { libc::_exit(wrong) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child; `status` outlives the call.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child);
    assert_eq!(status, 0, "a verb did not answer Forked in the child (bits above 8), or it died");
    let at: *mut u8 = ptr::with_exposed_provenance_mut(usize::try_from(mapping.address().0).unwrap());
    // SAFETY: mapped, and no job is queued.
    unsafe { at.write_volatile(7) };
    assert!(stream.synchronize(Duration::from_secs(10)).unwrap());
    say("unharmed");
}

#[test]
fn touching_what_is_not_mapped_dies_of_sigsegv() {
    let dir = tempfile::tempdir().unwrap();
    let mut mapped = Actor::start("touch-mapped", dir.path());
    assert_eq!((mapped.hear().as_str(), mapped.hear().as_str()), ("before", "alive"));
    assert_eq!(mapped.signal(), None);
    for (part, said) in [("touch-reserved", "before"), ("touch-unmapped", "unmapped")] {
        let mut actor = Actor::start(part, dir.path());
        assert_eq!((actor.hear().as_str(), actor.hear().as_str()), (said, ""), "{part}");
        assert_eq!(actor.signal(), Some(libc::SIGSEGV), "{part}");
    }
}

#[test]
fn an_unmap_under_a_queued_job_faults() {
    let dir = tempfile::tempdir().unwrap();
    let mut actor = Actor::start("copy-after-unmap", dir.path());
    assert_eq!(actor.hear(), "unmapped");
    assert_eq!(actor.signal(), Some(libc::SIGSEGV));
}

#[test]
fn two_processes_share_one_capacity_and_sigkill_returns_a_share() {
    let dir = tempfile::tempdir().unwrap();
    let mut actor = Actor::start("hold", dir.path());
    assert_eq!(actor.hear(), "holding");
    let device = open(dir.path());
    let memory = device.memory().unwrap();
    assert_eq!((memory.free, memory.used_by_this_process), (ByteCount::mib(48), ByteCount::ZERO));
    let large = Frame::create(&device, ByteCount::mib(32)).unwrap();
    assert!(matches!(
        Frame::create(&device, ByteCount::mib(18)),
        Err(DeviceError::OutOfMemory { free: ByteCount(free), .. }) if free == 16 << 20
    ));
    actor.tell("take");
    assert_eq!(actor.hear(), "taken");
    actor.tell("take");
    assert_eq!(actor.hear(), "refused, 0 B free");
    actor.tell("drop");
    assert_eq!(actor.hear(), "dropped");
    assert_eq!(device.memory().unwrap().free, ByteCount::mib(16));

    let shares = holders(dir.path(), 0).unwrap();
    let share_of = |process| shares.iter().find(|holder| holder.process == process).unwrap().bytes;
    assert_eq!(shares.len(), 2);
    assert_eq!(share_of(std::process::id()), ByteCount::mib(32));
    assert_eq!(share_of(actor.child.id()), ByteCount::mib(16));

    actor.child.kill().unwrap();
    assert_eq!(actor.signal(), Some(libc::SIGKILL));
    assert_eq!(device.memory().unwrap().free, ByteCount::mib(32));
    assert_eq!(holders(dir.path(), 0).unwrap().len(), 1);
    // Taken once more by the living, in the slot of the dead.
    let again = Frame::create(&device, ByteCount::mib(32)).unwrap();
    assert_eq!(device.memory().unwrap().free, ByteCount::ZERO);
    drop((large, again));
    drop(device);
    // Another test may be starting a process, which holds our descriptors until its exec.
    let deadline = Instant::now() + Duration::from_mins(1);
    while !holders(dir.path(), 0).unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the share of a dropped device stayed");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn many_processes_racing_never_exceed_the_capacity() {
    let dir = tempfile::tempdir().unwrap();
    let mut actors: Vec<_> = (0..3).map(|_| Actor::start("hold", dir.path())).collect();
    for actor in &mut actors {
        assert_eq!(actor.hear(), "holding");
    }
    // 48 of 64 MiB are held; of three that take at once, one gets the rest.
    for actor in &mut actors {
        actor.tell("take");
    }
    let answers: Vec<_> = actors.iter_mut().map(Actor::hear).collect();
    let taken = answers.iter().filter(|answer| *answer == "taken").count();
    assert_eq!(taken, 1, "{answers:?}");
    let held: ByteCount = holders(dir.path(), 0).unwrap().iter().map(|holder| holder.bytes).sum();
    assert_eq!(held, CAPACITY);
    for mut actor in actors {
        actor.tell("leave");
        assert_eq!(actor.signal(), None);
    }
}

#[test]
fn a_fork_is_refused_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut actor = Actor::start("fork", dir.path());
    assert_eq!(actor.hear(), "unharmed");
    assert_eq!(actor.signal(), None);
}

#[test]
fn a_device_is_one_size_for_all_and_ordinals_are_apart() {
    let dir = tempfile::tempdir().unwrap();
    let device = open(dir.path());
    let mut other = SimOptions::new(ByteCount::mib(32), dir.path());
    let refused = SimDevice::open(other.clone()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    assert!(matches!(refused, DeviceError::CapacityMismatch { capacity: CAPACITY, .. }), "{refused}");
    other.ordinal = 1;
    let second = SimDevice::open_dyn(other.clone()).unwrap();
    let _all = Frame::create(&second, ByteCount::mib(32)).unwrap();
    assert_eq!(device.memory().unwrap().free, CAPACITY);
    // With nobody left, it may be opened with another size.
    drop(device);
    other.ordinal = 0;
    let reopened = reopen(&other);
    assert_eq!(reopened.memory().unwrap().free, ByteCount::mib(32));
}

/// Another test may be starting a process, which holds our descriptors until its exec: then tries again.
fn reopen(options: &SimOptions) -> Arc<dyn Device> {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        match SimDevice::open_dyn(options.clone()) {
            Ok(device) => return device,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_ledger_that_cannot_be_used_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let device = open(dir.path());
    let path = dir.path().join("sim-0.ledger");
    fs::write(&path, b"not a ledger").unwrap();
    let is_ledger = |error: &DeviceError| matches!(error, DeviceError::Ledger { .. });
    assert!(device.memory().is_err_and(|error| is_ledger(&error)));
    assert!(SimDevice::open(SimOptions::new(CAPACITY, dir.path())).is_err_and(|error| is_ledger(&error)));
    drop(device);
    // Rubbish of the dead is no obstacle.
    let device = reopen(&SimOptions::new(CAPACITY, dir.path()));
    fs::remove_file(&path).unwrap();
    let lost = device.create_frame(MIB2).unwrap_err();
    assert!(is_ledger(&lost), "two ledgers would share one budget twice: {lost}");
    let under_a_file = SimOptions::new(CAPACITY, "/dev/null/shoal");
    assert!(SimDevice::open(under_a_file).is_err_and(|error| is_ledger(&error)));
}

#[test]
fn a_stopped_holder_of_the_header_does_not_hang_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let device = open(dir.path());
    let file = fs::File::options().read(true).write(true).open(dir.path().join("sim-0.ledger")).unwrap();
    // SAFETY: `flock` is a plain C struct of integers, for which all zeroes is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(libc::F_WRLCK).unwrap();
    lock.l_len = 64;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: the descriptor is open and `lock` is a valid `flock` for the whole call.
    assert_eq!(unsafe { libc::fcntl(descriptor, libc::F_OFD_SETLK, &raw mut lock) }, 0);
    let started = Instant::now();
    let refused = device.create_frame(MIB2).unwrap_err();
    assert!(matches!(refused, DeviceError::Ledger { .. }), "{refused}");
    assert!(started.elapsed() < Duration::from_secs(10));
    drop(file);
    let frame = device.create_frame(MIB2).unwrap();
    device.destroy_frame(frame).unwrap();
}
