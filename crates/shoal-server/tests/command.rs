//! `engine = "command"`: real programs that know nothing of Shoal, started, measured, drained and ended.

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_server::config::{MachineMemory, ServerConfig, Surroundings, parse};
use shoal_server::shelf::{Route, Shelf, Target};
use shoal_server::state::{EventKind, ModelSnapshot, ModelStatus};
use support::shelves::{alive, script};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MIB: u64 = 1 << 20;

struct Scene {
    dir: tempfile::TempDir,
    shelf: Shelf,
}

/// Short, so that sockets fit.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/tmp").expect("a directory")
}

fn start_in(dir: tempfile::TempDir, budget_mib: u64, models: &str) -> Scene {
    start_with(dir, budget_mib, models, |_| {})
}

fn start_with(
    dir: tempfile::TempDir,
    budget_mib: u64,
    models: &str,
    change: impl FnOnce(&mut ServerConfig),
) -> Scene {
    let surroundings = Surroundings {
        working_dir: dir.path().to_owned(),
        home: None,
        config_home: None,
        state_home: dir.path().join("state"),
        cache_home: dir.path().join("cache"),
        runtime_dir: dir.path().join("run"),
        python: PathBuf::from("python3"),
        memory: MachineMemory { total: ByteCount::gib(8), available: ByteCount::gib(8), cgroup_left: None },
        shared_memory: None,
        nvidia: None,
        gpus: None,
        budgets_before: None,
    };
    let text = format!("[server]\ndevice = 'sim'\ndevice_budget = '{budget_mib}MiB'\n{models}");
    let mut config: ServerConfig = parse(&text)
        .and_then(|file| file.resolve(&dir.path().join("shoal.toml"), &surroundings))
        .unwrap_or_else(|problems| panic!("{problems:?}"));
    change(&mut config);
    std::fs::create_dir_all(&config.log_dir).expect("made");
    let shelf = Shelf::start(Arc::new(config)).expect("the shelf starts");
    Scene { dir, shelf }
}

fn start(budget_mib: u64, models: &str) -> Scene {
    start_in(directory(), budget_mib, models)
}

/// A `[[model]]` whose engine is the fake program.
fn command(name: &str, device_mib: u64, args: &[&str], keys: &str) -> String {
    let args: Vec<String> = std::iter::once(script("fake_engine.py"))
        .chain(args.iter().map(|arg| (*arg).to_owned()))
        .map(|arg| format!("{arg:?}"))
        .collect();
    format!(
        "[[model]]\nname = '{name}'\nengine = 'command'\ncommand = 'python3'\nargs = [{}]\n\
         device_bytes = '{device_mib}MiB'\n{keys}\n",
        args.join(", ")
    )
}

/// A `[[model]]` whose worker speaks the control protocol.
fn worker(name: &str, weights_mib: u64) -> String {
    format!(
        "[[model]]\nname = '{name}'\nsource = 'none/none'\nengine = 'worker'\nargs = ['python3', '{}', '--control', \
         '{{control}}', '--model', '{{model}}', '--weights', '{weights_mib}']\n",
        script("fake_worker.py")
    )
}

fn soon() -> Instant {
    Instant::now() + Duration::from_mins(1)
}

impl Scene {
    fn model(&self, name: &str) -> ModelSnapshot {
        self.shelf.snapshot().model(name).expect("configured").clone()
    }

    fn story(&self) -> String {
        let events = self.shelf.events_since(0).expect("few");
        let line = |event: &Arc<shoal_server::state::Event>| {
            format!("{} {}: {}", event.id, event.model.as_deref().unwrap_or("-"), event.what)
        };
        events.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = soon();
        while !holds(self) {
            assert!(Instant::now() < deadline, "never came: {what}\n{}", self.story());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn route(&self, name: &str) -> Route {
        match self.shelf.route(name, soon()).await {
            Ok(route) => route,
            Err(error) => panic!("{error}\n{}", self.story()),
        }
    }

    fn ends(&self, name: &str) -> usize {
        let ended = |event: &&Arc<shoal_server::state::Event>| {
            event.model.as_deref() == Some(name) && matches!(event.what, EventKind::WorkerExited { .. })
        };
        self.shelf.events_since(0).expect("few").iter().filter(ended).count()
    }
}

async fn post(route: &Route, path: &str, body: &str) -> std::io::Result<String> {
    async fn over(
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        head: &str,
        body: &str,
    ) -> std::io::Result<String> {
        stream.write_all(format!("{head}{body}").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    match route.target() {
        Target::Tcp(address) => over(tokio::net::TcpStream::connect(address).await?, &head, body).await,
        Target::Unix(path) => over(tokio::net::UnixStream::connect(path).await?, &head, body).await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_is_started_when_it_is_needed_and_yields_all_it_has() {
    let models = command("llama", 60, &["--port", "{port}"], "env = { GREETING = 'I am {model}' }")
        + &worker("chat", 60);
    let scene = start(100, &models);
    scene.until("both are there", |scene| scene.model("chat").capabilities.is_some()).await;
    let asleep = scene.model("llama");
    assert_eq!(
        (asleep.status, asleep.pid, asleep.starts),
        (ModelStatus::Asleep, None, 0),
        "{}",
        scene.story()
    );
    assert!(!asleep.is_elastic && scene.model("chat").is_elastic);

    let body = r#"{ "model" : "llama",  "x": 1.50 }"#;
    let route = scene.route("llama").await;
    let answer = post(&route, "/v1/chat/completions", body).await.expect("an answer");
    assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{answer}");
    drop(route);
    let awake = scene.model("llama");
    assert_eq!((awake.status, awake.starts), (ModelStatus::Awake, 1));
    assert_eq!((awake.lease.weights, awake.bytes.weights_device), (ByteCount(60 * MIB), ByteCount(60 * MIB)));
    let log = std::fs::read_to_string(&awake.log).expect("a log");
    assert!(log.contains("I am llama with 0 bytes"), "{log}");
    let pid = awake.pid.expect("it runs");
    assert!(alive(pid));

    // Ten MiB less than it holds would do for the other: it has no part of that size.
    drop(scene.route("chat").await);
    let asleep = scene.model("llama");
    assert_eq!((asleep.status, asleep.pid), (ModelStatus::Asleep, None), "{}", scene.story());
    assert_eq!(asleep.lease.total, ByteCount::ZERO);
    assert!(!alive(pid));
    assert!(
        scene.story().contains("llama: gives up 60 MiB: chat needs 60 MiB for weights"),
        "{}",
        scene.story()
    );

    drop(scene.route("llama").await);
    assert_eq!(scene.model("llama").starts, 2);
    let refused = scene.shelf.sleep("llama", 0.5, soon()).await.expect_err("it has no half");
    assert!(refused.to_string().contains("all that it holds or nothing"), "{refused}");
    let report = scene.shelf.sleep("llama", 0.0, soon()).await.expect("it sleeps");
    assert_eq!(report.bytes, ByteCount(60 * MIB));
    scene.shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_it_answers_are_not_cut_off() {
    let dir = directory();
    let gate = dir.path().join("gate");
    let args = ["--port", "{port}", "--gate", &gate.to_string_lossy()];
    let scene = start_in(dir, 100, &command("llama", 60, &args, ""));
    let route = scene.route("llama").await;
    let answered = async {
        let answer = post(&route, "/v1/completions", "whole").await;
        drop(route);
        answer
    };
    let sleep = scene.shelf.sleep("llama", 0.0, soon());
    let next = async {
        scene.until("it drains", |scene| scene.model("llama").status == ModelStatus::Draining).await;
        // Who comes now waits until it is started again: it is on its way out.
        let open = async { std::fs::write(&gate, "open").expect("written") };
        tokio::join!(scene.route("llama"), open).0
    };
    let (answer, slept, next) = tokio::join!(answered, sleep, next);
    assert!(answer.expect("an answer").ends_with("\r\n\r\nwhole"), "{}", scene.story());
    assert_eq!(slept.expect("it sleeps").bytes, ByteCount(60 * MIB));
    assert!(next.was_asleep());
    assert_eq!(scene.model("llama").starts, 2, "{}", scene.story());
    drop(next);
    scene.shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_does_not_come_up_says_why_and_is_given_up() {
    let models = command("llama", 8, &["--port", "{port}", "--exit", "3"], "");
    let scene = start(100, &models);
    let error = scene.shelf.route("llama", soon()).await.expect_err("it cannot be served").to_string();
    assert!(error.contains("its command exited with status 3") && error.contains("no weights at"), "{error}");
    assert!(error.contains("3 times in a row"), "{error}");
    let failed = scene.model("llama");
    assert_eq!((failed.status, failed.starts), (ModelStatus::Failed, 3), "{}", scene.story());
    assert_eq!(failed.lease.total, ByteCount::ZERO);
    scene.until("all of it came back", |scene| scene.shelf.snapshot().device.leased == ByteCount::ZERO).await;
    let error = scene.shelf.wake("llama", soon()).await.expect_err("another three").to_string();
    assert!(error.contains("status 3"), "{error}");
    assert_eq!(scene.model("llama").starts, 6, "asked for by hand, it is tried again");
    scene.shelf.shutdown(soon()).await;

    let nowhere =
        command("llama", 8, &["--port", "{port}"], "").replace("'python3'", "'/nowhere/llama-server'");
    let scene = start(100, &nowhere);
    let error = scene.shelf.route("llama", soon()).await.expect_err("there is none").to_string();
    assert!(error.contains("/nowhere/llama-server cannot be started"), "{error}");
    scene.shelf.shutdown(soon()).await;

    let slow = command(
        "llama",
        8,
        &["--socket", "{socket}", "--start-ms", "60000"],
        "socket = true\nready_s_max = 4",
    );
    let scene = start(100, &slow);
    let error = scene.shelf.route("llama", soon()).await.expect_err("it takes a minute").to_string();
    assert!(error.contains("was not ready within 4 s (GET /health: it answered 503"), "{error}");
    assert_eq!(scene.ends("llama"), 3);
    scene.shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_dies_is_started_again_for_the_next_request() {
    let scene = start(100, &command("llama", 8, &["--socket", "{socket}"], "socket = true"));
    let route = scene.route("llama").await;
    assert!(matches!(route.target(), Target::Unix(_)));
    assert!(!post(&route, "/v1/die", "x").await.is_ok_and(|answer| answer.contains("200")));
    drop(route);
    scene.until("its end is seen", |scene| scene.ends("llama") == 1).await;
    scene.until("its lease is back", |scene| scene.model("llama").lease.total == ByteCount::ZERO).await;
    let error = scene.model("llama").error.expect("what happened");
    assert!(error.contains("was ended by signal 9") && error.contains("asked to die"), "{error}");
    let story = scene.story();
    assert!(story.contains("on the device: its command was ended by signal 9"), "{story}");
    assert!(story.contains("and what it started is ended as well"), "{story}");
    assert!(!story.contains("others need its memory"), "nobody does: {story}");
    let route = scene.route("llama").await;
    assert!(post(&route, "/v1/x", "again").await.expect("an answer").ends_with("again"));
    assert_eq!(scene.model("llama").error, None);
    scene.shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_all_that_it_started_also_where_it_does_not_want_to() {
    let dir = directory();
    let file = dir.path().join("child");
    let child = file.to_string_lossy().into_owned();
    let args = ["--port", "{port}", "--ignore-term", "--child", &child];
    let scene = start_in(dir, 100, &command("llama", 8, &args, "stop_s_max = 1"));
    drop(scene.route("llama").await);
    let pid = scene.model("llama").pid.expect("it runs");
    let child: u32 = std::fs::read_to_string(&file).expect("written").parse().expect("a number");
    assert!(alive(pid) && alive(child));
    scene.shelf.sleep("llama", 0.0, soon()).await.expect("it is made to");
    scene.until("both are gone", |_| !alive(pid) && !alive(child)).await;
    assert!(scene.story().contains("was ended by signal 9"), "{}", scene.story());

    drop(scene.route("llama").await);
    let pid = scene.model("llama").pid.expect("it runs");
    let child: u32 = std::fs::read_to_string(&file).expect("written").parse().expect("a number");
    scene.shelf.shutdown(soon()).await;
    assert!(!alive(pid) && !alive(child), "a server that ends leaves nothing");
    drop(scene.dir);
}

/// A script in front of a server is ended by the kernel, say, and the server that has the memory lives on.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_that_dies_had_started_is_gone_before_its_lease_comes_back() {
    let dir = directory();
    let file = dir.path().join("child");
    let child = file.to_string_lossy().into_owned();
    // Of so much the kernel takes a while to get rid.
    let args = ["--port", "{port}", "--child", &child, "--child-mib", "1024"];
    let scene = start_in(dir, 2_000, &command("llama", 1_100, &args, ""));
    for end in 1..=3 {
        let route = scene.route("llama").await;
        let child: u32 = std::fs::read_to_string(&file).expect("written").parse().expect("a number");
        assert!(alive(child));
        assert!(!post(&route, "/v1/die", "x").await.is_ok_and(|answer| answer.contains("200")));
        drop(route);
        scene.until("its end is seen", |scene| scene.ends("llama") == end).await;
        assert!(!alive(child), "its end is told when all of it is gone: {}", scene.story());
        scene.until("its lease is back", |scene| scene.model("llama").lease.total == ByteCount::ZERO).await;
    }
    scene.shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_charged_what_it_takes_where_that_is_more_than_declared() {
    let scene = start(200, &command("llama", 4, &["--port", "{port}", "--mib", "64"], ""));
    let route = scene.route("llama").await;
    scene.until("it is measured", |scene| scene.model("llama").lease.total >= ByteCount(64 * MIB)).await;
    let lease = scene.model("llama").lease;
    assert_eq!(lease.weights, ByteCount(4 * MIB), "{lease:?}");
    drop(route);
    scene.shelf.sleep("llama", 0.0, soon()).await.expect("it sleeps");
    scene.until("all of it came back", |scene| scene.shelf.snapshot().device.leased == ByteCount::ZERO).await;
    // What is known of it is asked for from the beginning.
    drop(scene.route("llama").await);
    assert!(scene.model("llama").lease.weights >= ByteCount(64 * MIB), "{:?}", scene.model("llama").lease);
    scene.shelf.shutdown(soon()).await;
}

/// A program asks nobody before it takes memory again, so what it gave back is nobody else's while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_took_at_most_is_kept_for_it_until_it_ends() {
    let dir = directory();
    let file = dir.path().join("let go");
    let line = ["--port", "{port}", "--mib", "64", "--lets-go", &file.to_string_lossy()];
    let scene = start_with(dir, 200, &command("llama", 4, &line, ""), |_| ());
    let route = scene.route("llama").await;
    scene.until("it is measured", |scene| scene.model("llama").lease.total >= ByteCount(64 * MIB)).await;
    std::fs::write(&file, "").expect("written");
    scene
        .until("it has given most of it back", |scene| {
            scene.model("llama").bytes.overhead_device < ByteCount(48 * MIB)
        })
        .await;
    let bytes = scene.model("llama").bytes;
    assert!(bytes.overhead_peak >= ByteCount(60 * MIB), "{bytes:?}");
    drop(route);
    scene.shelf.sleep("llama", 0.0, soon()).await.expect("it sleeps");
    scene.until("all of it came back", |scene| scene.shelf.snapshot().device.leased == ByteCount::ZERO).await;
    scene.shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_of_which_nothing_comes_is_ended_and_the_next_one_answers() {
    let dir = directory();
    let gate = dir.path().join("gate");
    let models = command("llama", 60, &["--port", "{port}", "--gate", &gate.to_string_lossy()], "");
    let patience = Duration::from_secs(2);
    let scene = start_with(dir, 100, &models, |config| config.patience.stuck_max = Some(patience));
    scene.until("it is there", |scene| scene.model("llama").capabilities.is_some()).await;
    let route = scene.route("llama").await;
    let pid = scene.model("llama").pid.expect("it runs");
    let hung = |scene: &Scene| {
        let events = scene.shelf.events_since(0).expect("few");
        let hung = events.iter().filter_map(|event| match &event.what {
            EventKind::WorkerHung { pid, reason, .. } => Some((*pid, reason.clone())),
            _ => None,
        });
        hung.collect::<Vec<_>>()
    };
    let waits = async {
        // Who gives bytes is none that hangs, however long another request has waited.
        tokio::time::sleep(patience + Duration::from_millis(200)).await;
        route.more_bytes();
        route.no_byte(Duration::from_mins(5));
        assert_eq!(hung(&scene), []);
        scene
            .until("it is gone", |_| {
                route.no_byte(Duration::from_mins(5));
                !alive(pid)
            })
            .await;
    };
    let (answer, ()) = tokio::join!(post(&route, "/v1/completions", "{}"), waits);
    assert!(answer.unwrap_or_default().is_empty(), "it never answered");
    let [(ended, reason)] = &hung(&scene)[..] else { panic!("{}", scene.story()) };
    assert_eq!(*ended, pid);
    assert!(reason.starts_with("it has 1 request, and nothing came of it for "), "{reason}");
    drop(route);
    scene.until("its end is told", |scene| scene.ends("llama") == 1).await;
    let events = scene.shelf.events_since(0).expect("few");
    let was_asked = |what: &EventKind| matches!(what, EventKind::WorkerExited { asked: true, .. });
    assert!(!events.iter().any(|event| was_asked(&event.what)), "nobody wanted it to end");
    scene.until("its memory is back", |scene| scene.model("llama").lease.total.is_zero()).await;

    std::fs::write(&gate, "").expect("written");
    let route = scene.route("llama").await;
    let answer = post(&route, "/v1/completions", "{}").await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let next = scene.model("llama");
    assert!(next.starts == 2 && next.pid != Some(pid) && next.error.is_none(), "{next:?}");
}
