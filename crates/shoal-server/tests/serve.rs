//! The whole server as a process: file to banner, requests to workers, Ctrl-C to nothing left.

mod support;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{get, post, refusal, text};

struct Served {
    child: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
    banner: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.current_dir(dir).env("HOME", dir).env("SHOAL_RUNTIME_DIR", dir.join("run"));
    for name in ["XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    for name in ["SHOAL_SERVER", "SHOAL_API_KEY", "SHOAL_LOG", "SHOAL_LOG_FORMAT"] {
        command.env_remove(name);
    }
    command
}

/// Two models of 100 MiB each on a device of 160 MiB.
fn serve() -> Served {
    serve_with(&[])
}

/// The same with more in its environment.
fn serve_with(environment: &[(&str, &str)]) -> Served {
    let dir = tempfile::tempdir_in("/tmp").expect("a directory");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_worker.py");
    let mut file =
        "[server]\nlisten='127.0.0.1:0'\ndevice='sim'\ndevice_budget='160MiB'\nwait_s_max=20\n".to_owned();
    for name in ["one", "two"] {
        let command = ["python3", &script.to_string_lossy(), "--control", "{control}", "--model", "{model}"];
        let _ =
            writeln!(file, "[[model]]\nname='{name}'\nsource='x/{name}'\nengine='worker'\nargs={command:?}");
    }
    std::fs::write(dir.path().join("shoal.toml"), file).expect("written");
    let mut child = command(dir.path())
        .arg("serve")
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut banner = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    while !banner.contains("Ctrl-C") {
        let length = out.read_line(&mut banner).expect("text");
        if length == 0 {
            let mut errors = String::new();
            let _ = child.stderr.take().expect("piped").read_to_string(&mut errors);
            panic!("it ended: {banner}{errors}");
        }
    }
    let page =
        banner.lines().find_map(|line| line.trim().strip_prefix("page")).expect("the page's address").trim();
    let address = page.trim_start_matches("http://").trim_end_matches('/').parse().expect("an address");
    Served { child, address, dir, banner }
}

impl Served {
    fn shoal(&self, args: &[&str]) -> (i32, String) {
        let output = command(self.dir.path()).args(args).output().expect("it starts");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
    }

    fn state(&self) -> Value {
        let (code, said) = self.shoal(&["state"]);
        assert_eq!(code, 0, "{said}");
        serde_json::from_str(&said).expect("JSON")
    }

    fn interrupt(&mut self) -> (i32, Duration) {
        let began = Instant::now();
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("running");
        let deadline = began + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().expect("ours") {
                return (status.code().unwrap_or(-1), began.elapsed());
            }
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn lives(pid: u64) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_models_share_less_than_they_need() {
    let mut served = serve();
    assert!(
        served.banner.contains("simulated in RAM") && served.banner.contains("one = x/one"),
        "{}",
        served.banner
    );
    for round in 0..2 {
        for name in ["one", "two"] {
            let body = format!(r#"{{"model":"{name}","messages":[0]}}"#);
            let (status, answer) = text(post(served.address, "/v1/chat/completions", body).await).await;
            assert_eq!(status, 200, "round {round}: {answer}");
            assert!(answer.contains("\"whole\": true"), "{answer}");
        }
    }
    let state = served.state();
    let count = |place: usize, what: &str| state["models"][place]["counts"][what].as_u64().expect("a number");
    assert!(count(0, "evictions") >= 1 && count(1, "evictions") >= 1, "{state:#}");
    assert_eq!((count(0, "wakes"), count(1, "wakes")), (2, 2), "{state:#}");
    assert!(state["device"]["leased"].as_u64() <= state["device"]["budget"].as_u64());
    assert_eq!(state["models"][0]["first_byte_asleep"]["count"], 2);

    let (_, metrics) = text(get(served.address, "/metrics").await).await;
    assert!(metrics.contains("shoal_requests_total{model=\"one\",status=\"200\"} 2"), "{metrics}");
    let (status, code, error) =
        refusal(post(served.address, "/v1/chat/completions", r#"{"model":"three","messages":[0]}"#).await)
            .await;
    assert_eq!((status, code.as_str()), (404, "model_not_found"));
    assert!(error["message"].as_str().expect("text").contains("one, two"), "{error}");

    for (args, expected) in [
        (vec!["wake", "one"], "one: "),
        (vec!["pin", "one"], "one: "),
        (vec!["ps"], "pinned"),
        (vec!["unpin", "one"], "one: "),
        (vec!["sleep", "one"], "one: "),
    ] {
        let (code, said) = served.shoal(&args);
        assert_eq!(code, 0, "{args:?}: {said}");
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    assert_eq!(served.state()["models"][0]["status"], "asleep");
    let (status, log) = text(get(served.address, "/api/v1/models/one/log").await).await;
    assert!(status == 200 && log.contains("welcome"), "{log}");

    let pids: Vec<u64> = served.state()["models"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|m| m["pid"].as_u64())
        .collect();
    assert_eq!(pids.len(), 2);
    let (code, took) = served.interrupt();
    assert_eq!(code, 0);
    // Shorter than the server lets answers linger.
    assert!(took < Duration::from_secs(18), "{took:?}");
    assert!(!served.dir.path().join("run/server.json").exists());
    assert!(pids.iter().all(|pid| !lives(*pid)), "no worker is left");
    let mut log = String::new();
    served.child.stderr.take().expect("piped").read_to_string(&mut log).expect("text");
    assert!(!log.contains("did not end in time"), "its workers end when told to: {log}");
    assert!(!log.contains('\x1b'), "no colours but on a terminal: {log}");
    assert!(log.contains(" INFO server started on sim with 160 MiB to share\n"), "said once: {log}");
    assert!(log.contains("one: awake: 100 MiB in "), "{log}");
    assert!(!log.contains("ByteCount") && !log.contains("Some("), "words, not what the compiler sees: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_for_programs_is_one_object_a_line() {
    let mut served = serve_with(&[("SHOAL_LOG_FORMAT", "json")]);
    let (status, _) =
        text(post(served.address, "/v1/chat/completions", r#"{"model":"one","messages":[0]}"#).await).await;
    assert_eq!(status, 200);
    assert_eq!(served.interrupt().0, 0);
    let mut log = String::new();
    served.child.stderr.take().expect("piped").read_to_string(&mut log).expect("text");
    let lines: Vec<Value> = log
        .lines()
        .filter(|line| !line.starts_with("shoal: "))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let woken = lines.iter().find(|line| line["event"] == "wake_done").expect("a line of the wake");
    assert_eq!(woken["model"], "one");
    assert_eq!(woken["level"], "INFO");
    assert!(
        woken["message"].as_str().is_some_and(|words| words.starts_with("one: awake: 100 MiB")),
        "{woken}"
    );
    let ids: Vec<u64> = lines.iter().filter_map(|line| line["id"].as_u64()).collect();
    assert!(ids.windows(2).all(|pair| pair[0] + 1 == pair[1]), "every event once, in order: {ids:?}");
}

#[test]
fn a_format_of_logs_that_is_not_there_is_refused() {
    let dir = tempfile::tempdir_in("/tmp").expect("a directory");
    std::fs::write(
        dir.path().join("shoal.toml"),
        "[server]\ndevice='sim'\ndevice_budget='64MiB'\n[[model]]\nname='a'\nsource='x/a'\n",
    )
    .expect("written");
    let output = command(dir.path()).arg("serve").env("SHOAL_LOG_FORMAT", "xml").output().expect("it starts");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(r#"SHOAL_LOG_FORMAT is "xml""#) && said.contains("text or json"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_of_the_same_directory_is_refused() {
    let served = serve();
    let (code, said) = served.shoal(&["serve"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("another shoal server") && said.contains(&served.child.id().to_string()), "{said}");
    assert_eq!(get(served.address, "/healthz").await.status(), 200, "the first goes on");
    assert!(served.dir.path().join("run/server.json").exists());
}
