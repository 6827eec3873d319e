//! The worker's end of the control socket, against a fake server in the test.

#[path = "../common/mod.rs"]
mod common;
mod figures;

use std::io::{BufRead, BufReader, IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, noise, open, open_slow};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::{
    FromServer, FromWorker, LINE_BYTES_MAX, LeaseKind, VERSION, WorkerCapabilities, WorkerHolds, WorkerUsage,
};
use shoal_device::HostBacking;
use shoal_device::host::HostFile;
use shoal_memory::{
    Backing, BrokerClient, LeaseError, LeaseSource, ManagerOptions, MemoryManager, Region, RegionSpec,
};

const SHORT: Duration = Duration::from_millis(100);

struct Fake {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Fake {
    fn say(&mut self, said: &FromServer) {
        let mut line = serde_json::to_vec(said).expect("plain data");
        line.push(b'\n');
        self.writer.write_all(&line).expect("written");
    }

    /// The next line that is not a usage line.
    fn hear(&mut self) -> FromWorker {
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).expect("a line in time");
            let said = serde_json::from_str(&line).expect("the protocol");
            if !matches!(said, FromWorker::Usage { .. }) {
                return said;
            }
        }
    }

    /// The next figures that are so.
    fn hear_usage(&mut self, is_it: impl Fn(&WorkerUsage) -> bool) -> WorkerUsage {
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).expect("a line in time");
            match serde_json::from_str(&line).expect("the protocol") {
                FromWorker::Usage { usage } if is_it(&usage) => return usage,
                _ => {}
            }
        }
    }

    fn hear_request(&mut self) -> (u64, LeaseKind, ByteCount) {
        match self.hear() {
            FromWorker::LeaseRequest { request, kind, bytes, .. } => (request, kind, bytes),
            other => panic!("{other:?} is no lease request"),
        }
    }
}

impl Fake {
    /// As `say`, and a file with it.
    fn say_with(&self, said: &FromServer, file: &HostFile) {
        let mut line = serde_json::to_vec(said).expect("plain data");
        line.push(b'\n');
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let sent = sendmsg(&self.writer, &[IoSlice::new(&line)], &mut control, SendFlags::empty());
        assert_eq!(sent.expect("sent"), line.len());
    }

    fn hear_slab_request(&mut self) -> (u64, ByteCount) {
        match self.hear() {
            FromWorker::SlabRequest { request, bytes } => (request, bytes),
            other => panic!("{other:?} is no request for memory"),
        }
    }
}

impl Fake {
    /// What is given back, and the next request: the one who asks does not wait for what the reader gives back.
    fn hear_return_and_request(&mut self) -> (FromWorker, u64, ByteCount) {
        match (self.hear(), self.hear()) {
            (FromWorker::SlabRequest { request, bytes }, other)
            | (other, FromWorker::SlabRequest { request, bytes }) => (other, request, bytes),
            others => panic!("{others:?} are no request for memory"),
        }
    }
}

fn welcome(version: u32) -> FromServer {
    FromServer::Welcome {
        version,
        spec: serde_json::json!({"source": "a directory"}),
        device: "sim".to_owned(),
        device_bytes: ByteCount::mib(64),
        host_budget: ByteCount::mib(64),
        data_socket: "data.sock".to_owned(),
        lends_slabs: true,
        server_wait_ms: 0,
        forwards_when_backed: true,
    }
}

fn accept(listener: &UnixListener) -> Fake {
    let (writer, _) = listener.accept().expect("a worker");
    writer.set_read_timeout(Some(WAIT)).expect("set");
    let mut fake = Fake { reader: BufReader::new(writer.try_clone().expect("cloned")), writer };
    let hello = fake.hear();
    assert!(
        matches!(hello, FromWorker::Hello { version: VERSION, ref model, pid: 7, holds: None, answers_pings: true }
            if model == "chat"),
        "{hello:?}"
    );
    fake
}

fn pair(dir: &Path) -> (Arc<BrokerClient>, Fake) {
    pair_by(dir, welcome(VERSION))
}

fn pair_by(dir: &Path, welcome: FromServer) -> (Arc<BrokerClient>, Fake) {
    let path = dir.join("control.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let server = thread::spawn(move || {
        let mut fake = accept(&listener);
        fake.say(&welcome);
        fake
    });
    let (client, welcome) = BrokerClient::connect(&path, "chat", 7, WAIT).expect("welcome");
    assert_eq!((welcome.device.as_str(), welcome.host_budget), ("sim", ByteCount::mib(64)));
    (client, server.join().expect("no panic"))
}

fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !is_true() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_ping_is_answered_whatever_else_is_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake) = pair(dir.path());
    // Nobody serves orders yet, and somebody waits for a lease: the thread that reads answers all the same.
    fake.say(&FromServer::Wake { order: 1, deadline_ms: 60_000, reason: "a test".to_owned() });
    let asks = Arc::clone(&client);
    let asking = thread::spawn(move || {
        asks.acquire(LeaseKind::Kv, ByteCount::mib(2), ByteCount::mib(2), WAIT, "a test")
    });
    assert!(matches!(fake.hear(), FromWorker::LeaseRequest { .. }));
    for ping in [1, 2] {
        fake.say(&FromServer::Ping { ping });
        assert_eq!(fake.hear(), FromWorker::Pong { ping });
    }
    fake.say(&FromServer::LeaseGrant { request: 1, kind: LeaseKind::Kv, bytes: ByteCount::mib(2) });
    assert_eq!(asking.join().expect("no panic"), Ok(ByteCount::mib(2)));
}

#[test]
fn memory_is_borrowed_with_its_file_refused_and_returned() {
    const SLAB: ByteCount = ByteCount::mib(4);
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake) = pair(dir.path());
    let server = thread::spawn(move || {
        let file = HostFile::create(SLAB, HostBacking::SharedHugePages).expect("memory");
        let mut content = std::fs::File::from(OwnedFd::from(file.try_clone().expect("a descriptor")));
        content.write_all(b"left there").expect("memory");
        let grant = |request, slab, bytes| {
            let (is_set_aside, is_zeroed) = (false, false);
            FromServer::SlabGrant { request, slab, bytes, is_set_aside, is_zeroed }
        };
        let (request, bytes) = fake.hear_slab_request();
        fake.say_with(&grant(request, 5, bytes), &file);
        let (request, _) = fake.hear_slab_request();
        fake.say(&FromServer::SlabDeny { request, reason: "4 MiB are lent".to_owned() });
        // One without its file, and one of another length than it says.
        let (request, bytes) = fake.hear_slab_request();
        fake.say(&grant(request, 6, bytes));
        let (first, request, _) = fake.hear_return_and_request();
        fake.say_with(&grant(request, 7, ByteCount::mib(6)), &file);
        // One that comes too late.
        let (second, request, bytes) = fake.hear_return_and_request();
        (fake, file, [first, second], request, bytes)
    });
    let source = client.slab_source().expect("the server lends");
    let lent = source.borrow_slab(SLAB, WAIT).expect("granted");
    assert_eq!((lent.slab, lent.file.bytes(), lent.is_zeroed), (5, SLAB, false));
    let mut content = std::fs::File::from(OwnedFd::from(lent.file));
    let mut text = [0; 10];
    content.rewind().expect("memory");
    content.read_exact(&mut text).expect("memory");
    assert_eq!(&text, b"left there");
    assert_eq!(source.borrow_slab(SLAB, WAIT).expect_err("denied"), "4 MiB are lent");
    let no_file = source.borrow_slab(SLAB, WAIT).expect_err("nothing to map");
    assert!(no_file.contains("no file"), "{no_file}");
    let longer = source.borrow_slab(SLAB, WAIT).expect_err("another length");
    assert!(longer.contains("6 MiB"), "{longer}");
    let late = source.borrow_slab(SLAB, SHORT).expect_err("no answer");
    assert!(late.contains("no answer"), "{late}");
    let (mut fake, file, returned, request, bytes) = server.join().expect("no panic");
    assert_eq!(returned, [6, 7].map(|slab| FromWorker::SlabReturn { slab }));
    let (is_set_aside, is_zeroed) = (false, true);
    fake.say_with(&FromServer::SlabGrant { request, slab: 8, bytes, is_set_aside, is_zeroed }, &file);
    assert_eq!(fake.hear(), FromWorker::SlabReturn { slab: 8 }, "nobody waits for it any more");
    source.return_slab(5);
    assert_eq!(fake.hear(), FromWorker::SlabReturn { slab: 5 });
    client.close("the end");
    assert!(source.borrow_slab(SLAB, WAIT).is_err());
}

#[test]
fn leases_are_asked_for_granted_denied_and_returned() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake) = pair(dir.path());
    let server = thread::spawn(move || {
        let (request, kind, bytes) = fake.hear_request();
        fake.say(&FromServer::LeaseGrant { request, kind, bytes });
        let (request, ..) = fake.hear_request();
        fake.say(&FromServer::LeaseDeny { request, reason: "2 MiB left".to_owned() });
        let (request, kind, _) = fake.hear_request();
        fake.say(&FromServer::LeaseGrant { request, kind, bytes: ByteCount(1) });
        let returned = (fake.hear(), fake.hear());
        (fake, returned)
    });
    let ask = |bytes| client.acquire(LeaseKind::Kv, bytes, bytes, WAIT, "a test");
    assert_eq!(ask(ByteCount::mib(4)), Ok(ByteCount::mib(4)));
    assert!(
        matches!(ask(ByteCount::mib(9)), Err(LeaseError::Denied { reason, .. }) if reason == "2 MiB left")
    );
    assert!(matches!(ask(ByteCount::mib(2)), Err(LeaseError::Denied { .. })), "less than the least");
    assert_eq!(client.held(LeaseKind::Kv), ByteCount::mib(4));
    client.give_back(LeaseKind::Kv, ByteCount::mib(4));
    let (_fake, returned) = server.join().expect("no panic");
    let back = |bytes| FromWorker::LeaseReturn { kind: LeaseKind::Kv, bytes };
    assert_eq!(returned, (back(ByteCount(1)), back(ByteCount::mib(4))));
    assert_eq!(client.held(LeaseKind::Kv), ByteCount::ZERO);
}

#[test]
fn silence_ends_at_the_deadline_and_a_grant_that_crosses_is_returned() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake) = pair(dir.path());
    let refused = client.acquire(LeaseKind::Weights, ByteCount::mib(2), ByteCount::mib(2), SHORT, "a test");
    assert!(matches!(refused, Err(LeaseError::Deadline { .. })), "{refused:?}");
    let (request, kind, bytes) = fake.hear_request();
    assert_eq!(fake.hear(), FromWorker::LeaseCancel { request });
    fake.say(&FromServer::LeaseGrant { request, kind, bytes });
    assert_eq!(fake.hear(), FromWorker::LeaseReturn { kind, bytes });
    assert_eq!(client.held(kind), ByteCount::ZERO);
}

#[test]
fn a_server_that_goes_away_is_heard_by_all_who_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake) = pair(dir.path());
    let (hooked, heard) = mpsc::channel();
    client.on_disconnect(move |reason| hooked.send(reason.to_owned()).expect("waiting"));
    let waiting = {
        let client = Arc::clone(&client);
        thread::spawn(move || client.acquire(LeaseKind::Kv, ByteCount(1), ByteCount(1), WAIT, "a test"))
    };
    fake.hear_request();
    drop(fake);
    assert!(matches!(waiting.join().expect("no panic"), Err(LeaseError::Disconnected { .. })));
    assert!(heard.recv_timeout(WAIT).expect("the hook").contains("closed"));
    let refused = client.acquire(LeaseKind::Kv, ByteCount(1), ByteCount(1), WAIT, "a test");
    assert!(matches!(refused, Err(LeaseError::Disconnected { .. })));
    assert_eq!(client.wait_shutdown(WAIT), None);
    let (hooked, heard) = mpsc::channel();
    client.on_disconnect(move |_| hooked.send(()).expect("waiting"));
    heard.recv_timeout(SHORT).expect("called at once");
}

/// A server that lets its workers wait, and the path it listens at.
fn patient(dir: &Path, wait_ms: u64) -> (Arc<BrokerClient>, Fake, std::path::PathBuf) {
    let path = dir.join("control.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let server = thread::spawn(move || {
        let mut fake = accept(&listener);
        fake.say(&patient_welcome(wait_ms));
        fake
    });
    let (client, welcome) = BrokerClient::connect(&path, "chat", 7, WAIT).expect("welcome");
    assert_eq!(welcome.server_wait, Duration::from_millis(wait_ms));
    (client, server.join().expect("no panic"), path)
}

fn patient_welcome(wait_ms: u64) -> FromServer {
    match welcome(VERSION) {
        FromServer::Welcome {
            version,
            spec,
            device,
            device_bytes,
            host_budget,
            data_socket,
            lends_slabs,
            forwards_when_backed,
            ..
        } => {
            let server_wait_ms = wait_ms;
            FromServer::Welcome {
                version,
                spec,
                device,
                device_bytes,
                host_budget,
                data_socket,
                lends_slabs,
                server_wait_ms,
                forwards_when_backed,
            }
        }
        other => other,
    }
}

/// The next server at `path`: its end of the connection, and what the worker says it holds.
fn next_server(path: &Path) -> (Fake, WorkerHolds) {
    std::fs::remove_file(path).expect("the last one's");
    let listener = UnixListener::bind(path).expect("bound");
    let (writer, _) = listener.accept().expect("a worker");
    writer.set_read_timeout(Some(WAIT)).expect("set");
    let mut fake = Fake { reader: BufReader::new(writer.try_clone().expect("cloned")), writer };
    match fake.hear() {
        FromWorker::Hello { pid: 7, holds: Some(holds), .. } => (fake, *holds),
        other => panic!("{other:?} does not say what it holds"),
    }
}

#[test]
fn another_server_hears_what_is_held_and_what_is_still_asked_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake, path) = patient(dir.path(), 30_000);
    client.ready(WorkerCapabilities { context_tokens: 9, ..WorkerCapabilities::default() });
    assert!(matches!(fake.hear(), FromWorker::Ready { .. }));
    let ask = |kind, mib| {
        let client = Arc::clone(&client);
        let bytes = ByteCount::mib(mib);
        thread::spawn(move || client.acquire(kind, bytes, bytes, WAIT, "a test"))
    };
    let granted = ask(LeaseKind::Weights, 8);
    let (request, kind, bytes) = fake.hear_request();
    fake.say(&FromServer::LeaseGrant { request, kind, bytes });
    assert_eq!(granted.join().expect("no panic").expect("granted"), bytes);
    // One is answered by the next server; of the other, the answer is there before the server goes.
    let open = ask(LeaseKind::Kv, 4);
    let (request_open, ..) = fake.hear_request();
    let answered = ask(LeaseKind::Weights, 2);
    let (request, kind, bytes) = fake.hear_request();
    fake.say(&FromServer::LeaseGrant { request, kind, bytes });
    drop(fake);
    answered.join().expect("no panic").expect("granted");
    client.give_back(LeaseKind::Weights, ByteCount::mib(3));
    assert_eq!(client.closed(), None, "it waits");
    let (mut fake, holds) = next_server(&path);
    assert_eq!(
        (holds.weights, holds.kv, holds.host_budget),
        (ByteCount::mib(7), ByteCount(0), ByteCount::mib(64))
    );
    assert_eq!(holds.capabilities.map(|can| can.context_tokens), Some(9));
    assert_eq!(fake.hear_request(), (request_open, LeaseKind::Kv, ByteCount::mib(4)));
    fake.say(&patient_welcome(30_000));
    fake.say(&FromServer::LeaseGrant {
        request: request_open,
        kind: LeaseKind::Kv,
        bytes: ByteCount::mib(4),
    });
    open.join().expect("no panic").expect("granted");
    client.give_back(LeaseKind::Kv, ByteCount::mib(4));
    let back = FromWorker::LeaseReturn { kind: LeaseKind::Kv, bytes: ByteCount::mib(4) };
    assert_eq!(fake.hear(), back, "it speaks to the new one");
}

/// Whatever is given back while servers come and go, each hears a hello and returns that fit together.
#[test]
fn no_byte_is_lost_or_counted_twice_between_two_servers() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake, path) = patient(dir.path(), 30_000);
    let granted = {
        let client = Arc::clone(&client);
        thread::spawn(move || {
            let bytes = ByteCount::mib(512);
            client.acquire(LeaseKind::Kv, bytes, bytes, WAIT, "a test")
        })
    };
    let (request, kind, bytes) = fake.hear_request();
    fake.say(&FromServer::LeaseGrant { request, kind, bytes });
    granted.join().expect("no panic").expect("granted");
    let giving = {
        let client = Arc::clone(&client);
        thread::spawn(move || {
            for _ in 0..512 {
                client.give_back(LeaseKind::Kv, ByteCount::mib(1));
                thread::sleep(Duration::from_micros(400));
            }
        })
    };
    for _ in 0..4 {
        thread::sleep(Duration::from_millis(15));
        drop(fake);
        let (mut next, holds) = next_server(&path);
        next.say(&patient_welcome(30_000));
        let mut held = holds.kv;
        for _ in 0..10 {
            if held.is_zero() {
                break;
            }
            let FromWorker::LeaseReturn { bytes, .. } = next.hear() else { panic!("no return") };
            held = ByteCount(held.0.checked_sub(bytes.0).expect("more came back than was held"));
        }
        fake = next;
    }
    giving.join().expect("no panic");
    assert_eq!(client.held(LeaseKind::Kv), ByteCount::ZERO);
    drop(fake);
    let (_fake, holds) = next_server(&path);
    assert_eq!(holds.kv, ByteCount::ZERO);
}

#[test]
fn slabs_are_handed_on_with_their_files_until_they_are_returned() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake, path) = patient(dir.path(), 30_000);
    let source = client.slab_source().expect("it lends");
    let borrow = {
        let source = Arc::clone(&source);
        thread::spawn(move || [0, 1].map(|_| source.borrow_slab(ByteCount::mib(2), WAIT).expect("lent")))
    };
    let file = HostFile::create(ByteCount::mib(2), HostBacking::SharedHugePages).expect("memory");
    for slab in [3, 4] {
        let (request, bytes) = fake.hear_slab_request();
        let granted = FromServer::SlabGrant { request, slab, bytes, is_set_aside: false, is_zeroed: true };
        fake.say_with(&granted, &file);
    }
    let lent = borrow.join().expect("no panic");
    source.return_slab(lent[0].slab);
    assert_eq!(fake.hear(), FromWorker::SlabReturn { slab: 3 });
    drop(fake);
    let (mut fake, _) = next_server(&path);
    assert!(
        matches!(fake.hear(), FromWorker::SlabHeld { slab: 4, bytes, is_set_aside: false } if bytes == ByteCount::mib(2))
    );
}

#[test]
fn a_server_that_refuses_and_one_that_never_comes_end_the_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, fake, path) = patient(dir.path(), 30_000);
    drop(fake);
    let (mut fake, _) = next_server(&path);
    fake.say(&FromServer::Refused { reason: "its model is gone".to_owned() });
    until("closed", || client.closed().is_some());
    assert!(client.closed().expect("closed").contains("its model is gone"));

    let dir = tempfile::tempdir().expect("a directory");
    let (client, fake, _) = patient(dir.path(), 300);
    let (hooked, heard) = mpsc::channel();
    client.on_disconnect(move |reason| hooked.send(reason.to_owned()).expect("waiting"));
    let begun = Instant::now();
    drop(fake);
    let reason = heard.recv_timeout(WAIT).expect("the hook");
    assert!(begun.elapsed() >= Duration::from_millis(300), "it waits");
    assert!(reason.contains("no other came"), "{reason}");

    // An order to finish is no reason to wait for anybody.
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake, _) = patient(dir.path(), 30_000);
    fake.say(&FromServer::Shutdown { deadline_ms: 100, reason: "a test".to_owned() });
    assert!(client.wait_shutdown(WAIT).is_some());
    drop(fake);
    until("closed", || client.closed().is_some());
}

#[test]
fn what_is_not_the_protocol_closes_the_socket() {
    for (garbage, part) in [
        (b"{\"say\":\"sing\"}\n".to_vec(), "not the protocol"),
        (b"\xff\xfe\n".to_vec(), "not the protocol"),
        (vec![b'x'; LINE_BYTES_MAX + 1], "longer than"),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let (client, mut fake) = pair(dir.path());
        let _ = fake.writer.write_all(&garbage);
        until("closed", || client.closed().is_some());
        let reason = client.closed().expect("closed");
        assert!(reason.contains(part), "{reason}");
    }
}

#[test]
fn only_a_server_of_this_version_is_welcome() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("control.sock");
    let missing = BrokerClient::connect(&path, "chat", 7, SHORT).expect_err("nobody there");
    assert!(missing.to_string().contains("control.sock"), "{missing}");
    let listener = UnixListener::bind(&path).expect("bound");
    let server = thread::spawn(move || {
        let mut other = accept(&listener);
        other.say(&welcome(VERSION + 1));
        let silent = accept(&listener);
        (listener, other, silent)
    });
    let other = BrokerClient::connect(&path, "chat", 7, WAIT).expect_err("another version");
    assert!(other.to_string().contains("version 2"), "{other}");
    let silent = BrokerClient::connect(&path, "chat", 7, SHORT).expect_err("silence");
    assert!(silent.to_string().contains("in time"), "{silent}");
    server.join().expect("no panic");
}

fn reclaim(order: u64, bytes: ByteCount, is_own: bool, deadline_ms: u64) -> FromServer {
    FromServer::Reclaim { order, bytes, is_own, cached_last: false, deadline_ms, reason: "room".to_owned() }
}

#[test]
fn orders_are_carried_out_and_answered_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake) = pair(dir.path());
    let options = ManagerOptions::new(ByteCount::mib(64), Arc::clone(&client) as _);
    let manager = MemoryManager::new(open(dir.path(), 64), options).expect("a manager");
    let region = weights(&manager, 4);
    client.serve(&manager).expect("threads");
    assert!(client.serve(&manager).is_err());

    fake.say(&FromServer::Wake { order: 1, deadline_ms: 20_000, reason: "a request".to_owned() });
    let (request, kind, bytes) = fake.hear_request();
    assert_eq!((kind, bytes), (LeaseKind::Weights, ByteCount(4 * PAGE)));
    // While the wake waits for its lease a reclaim is answered.
    fake.say(&reclaim(2, ByteCount(1), false, 5000));
    let done = fake.hear();
    assert!(matches!(done, FromWorker::OrderDone { order: 2, bytes: ByteCount(0), .. }), "{done:?}");
    fake.say(&FromServer::LeaseGrant { request, kind, bytes });
    match fake.hear() {
        FromWorker::OrderDone { order: 1, bytes, error: None, .. } => assert_eq!(bytes, ByteCount(4 * PAGE)),
        other => panic!("{other:?}"),
    }
    fake.say(&reclaim(3, ByteCount(PAGE + 1), false, 9000));
    let returned = fake.hear();
    assert_eq!(
        returned,
        FromWorker::LeaseReturn { kind, bytes: ByteCount(2 * PAGE) },
        "given back before it is said"
    );
    match fake.hear() {
        FromWorker::OrderDone { order: 3, bytes, error: None, .. } => assert_eq!(bytes, ByteCount(2 * PAGE)),
        other => panic!("{other:?}"),
    }
    // What the model's own weights are to have is not taken from them.
    fake.say(&reclaim(9, ByteCount(PAGE), true, 9000));
    assert!(matches!(fake.hear(), FromWorker::OrderDone { order: 9, bytes: ByteCount(0), error: None, .. }));
    assert_eq!(region.usage().missing, ByteCount(2 * PAGE), "no more than before");
    // What leaves while a wake waits comes back with it: one lease, larger than what was asked for.
    fake.say(&FromServer::Wake { order: 6, deadline_ms: 20_000, reason: String::new() });
    let (request, kind, bytes) = fake.hear_request();
    assert_eq!(bytes, ByteCount(2 * PAGE));
    fake.say(&reclaim(7, ByteCount(2 * PAGE), false, 9000));
    assert_eq!(fake.hear(), FromWorker::LeaseReturn { kind, bytes });
    assert!(matches!(fake.hear(), FromWorker::OrderDone { order: 7, error: None, .. }));
    fake.say(&FromServer::LeaseGrant { request, kind, bytes: ByteCount(4 * PAGE) });
    match fake.hear() {
        FromWorker::OrderDone { order: 6, bytes, error: None, .. } => assert_eq!(bytes, ByteCount(4 * PAGE)),
        other => panic!("{other:?}"),
    }
    assert_eq!(region.usage().missing, ByteCount::ZERO);
    fake.say(&reclaim(8, bytes, false, 9000));
    assert_eq!(fake.hear(), FromWorker::LeaseReturn { kind, bytes });
    assert!(matches!(fake.hear(), FromWorker::OrderDone { order: 8, error: None, .. }));
    // A step holds its guard: the order fails in time, and says why.
    fake.say(&FromServer::Wake { order: 4, deadline_ms: 300, reason: String::new() });
    let (request, ..) = fake.hear_request();
    fake.say(&FromServer::LeaseDeny { request, reason: "pinned models hold it all".to_owned() });
    match fake.hear() {
        FromWorker::OrderDone { order: 4, error: Some(error), .. } => {
            assert!(error.contains("pinned"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    fake.say(&FromServer::Shutdown { deadline_ms: 1000, reason: "the end".to_owned() });
    assert_eq!(client.wait_shutdown(WAIT).expect("came").reason, "the end");

    drop(region);
    drop(manager);
    until("returned", || client.held(LeaseKind::Weights).is_zero());
    fake.say(&reclaim(5, ByteCount(1), false, 10));
    loop {
        match fake.hear() {
            FromWorker::OrderDone { order: 5, error, .. } => {
                assert!(error.is_some_and(|error| error.contains("gone")));
                break;
            }
            FromWorker::LeaseReturn { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn weights(manager: &Arc<MemoryManager>, pages: u64) -> Region {
    let (name, bytes, kind) = ("weights".to_owned(), ByteCount(pages * PAGE), LeaseKind::Weights);
    let (extent_rule, backing) = (ExtentRule::default(), Backing::Keep);
    let region = manager.region(RegionSpec { name, bytes, kind, extent_rule, backing }).expect("addresses");
    region.stage(ByteCount::ZERO, &noise(pages * PAGE, 1), None).expect("host room");
    region.seal().expect("sealed");
    region
}

/// A worker's weights, asleep, with its connection.
fn sleeping(dir: &Path, welcome: FromServer) -> (Region, Arc<BrokerClient>, Fake) {
    let (client, fake) = pair_by(dir, welcome);
    let options = ManagerOptions::new(ByteCount::mib(64), Arc::clone(&client) as _);
    let device = open_slow(dir, 64, ByteCount::mib(128));
    let manager = MemoryManager::new(device, options).expect("a manager");
    let region = weights(&manager, 8);
    client.serve(&manager).expect("threads");
    (region, client, fake)
}

/// Wakes it once; whether it said that its memory was there before it said that all is done.
fn says_backed(fake: &mut Fake, number: u64) -> bool {
    fake.say(&FromServer::Wake { order: number, deadline_ms: 20_000, reason: String::new() });
    let (request, kind, bytes) = fake.hear_request();
    fake.say(&FromServer::LeaseGrant { request, kind, bytes });
    let mut was_said = false;
    loop {
        match fake.hear() {
            FromWorker::WakeBacked { order } if order == number && !was_said => was_said = true,
            FromWorker::OrderDone { order, error: None, .. } if order == number => break,
            other => panic!("{other:?}"),
        }
    }
    let all = ByteCount(u64::MAX);
    fake.say(&reclaim(number + 1, all, false, 9000));
    assert!(matches!(fake.hear(), FromWorker::LeaseReturn { .. }));
    assert!(matches!(fake.hear(), FromWorker::OrderDone { error: None, .. }));
    was_said
}

#[test]
fn a_wake_is_said_to_have_its_memory_where_steps_run_beside_it_and_the_server_listens() {
    for (listens, steps_in_order) in [(true, true), (true, false), (false, true)] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut said = serde_json::to_value(welcome(VERSION)).expect("plain data");
        if !listens {
            said.as_object_mut().expect("a message").remove("forwards_when_backed"); // as one of before
        }
        let (region, client, mut fake) =
            sleeping(dir.path(), serde_json::from_value(said).expect("the protocol"));
        if steps_in_order {
            client.set_steps_in_order();
        }
        // A wake may be over before it can be said; not each time.
        let mut tries = 0..8;
        assert_eq!(tries.any(|n| says_backed(&mut fake, 10 + 2 * n)), listens && steps_in_order);
        drop(region);
    }
}
