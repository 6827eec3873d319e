//! The command line against a server, and against what can stand in its way.

mod support;

use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::Value;
use support::{FakeModels, KEY, settings, start};

/// Runs a command in this process, on a thread of its own.
async fn said(args: &[&str], url: &str) -> (i32, String, String) {
    let mut args: Vec<String> =
        std::iter::once("shoal").chain(args.iter().copied()).map(str::to_owned).collect();
    args.extend(["--server".to_owned(), url.to_owned()]);
    let ran = tokio::task::spawn_blocking(move || {
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let code = shoal_server::cli::run_to(args, &mut out, &mut errors);
        (code, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&errors).into_owned())
    });
    ran.await.expect("it never panics")
}

#[tokio::test]
async fn commands_reach_the_server() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let url = format!("http://{}", server.address);
    for (args, expected) in [
        (vec!["wake", "chat"], "chat: wake chat\n"),
        (vec!["sleep", "chat", "--keep", "0.4"], "chat: sleep chat 0.4\n"),
        (vec!["pin", "chat"], "chat: pin chat true\n"),
        (vec!["unpin", "chat"], "chat: pin chat false\n"),
    ] {
        assert_eq!(said(&args, &url).await, (0, expected.to_owned(), String::new()));
    }
    models.event(true);
    let (code, out, errors) = said(&["why", "chat", "--last", "7"], &url).await;
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(out, "why chat 7\n\n   0.1 s ago  pinned\n");
    let (code, out, _) = said(&["why", "chat", "--json"], &url).await;
    let why: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &why["decisions"][0]["text"]), (0, &"pinned".into()));
    assert!(said(&["why", "nobody"], &url).await.2.contains("there is no model \"nobody\""));
    let (code, out, _) = said(&["wake", "chat", "--json"], &url).await;
    let report: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &report["bytes"]), (0, &2_097_152.into()));
    let (code, out, errors) = said(&["wake", "nobody"], &url).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(errors.contains("there is no model \"nobody\"; there are: chat"), "{errors}");
    let (code, _, errors) = said(&["wake", "../../v1/models"], &url).await;
    assert_eq!(code, 1);
    assert!(errors.contains("there is no model \"../../v1/models\""), "{errors}");
}

#[tokio::test]
async fn ps_shows_a_table_and_json() {
    let server = start(FakeModels::new(), "", false, settings()).await;
    let url = format!("http://{}", server.address);
    let (code, out, _) = said(&["ps"], &url).await;
    assert_eq!(code, 0);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "sim (simulated in RAM): 130 MiB of 640 MiB leased");
    assert!(lines[1].starts_with("MODEL    STATUS") && lines[2].starts_with("chat     awake"), "{out}");
    assert!(lines[2].ends_with("awake 11 ms, asleep 11 ms"), "{out}");
    for args in [["ps", "--json"].as_slice(), &["state"]] {
        let (_, out, _) = said(args, &url).await;
        let state: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(state["models"][1]["name"], "slow");
    }
}

#[tokio::test]
async fn keys_are_shown_from_a_file() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", true, settings()).await;
    let url = format!("http://{}", server.address);
    let (code, _, errors) = said(&["ps"], &url).await;
    assert_eq!(code, 1);
    assert!(errors.contains("wants an API key") && !errors.contains(KEY), "{errors}");
    let file = models.dir.path().join("keys");
    let (code, out, errors) = said(&["ps", "--api-key-file", file.to_str().expect("text")], &url).await;
    assert_eq!(code, 0, "{errors}");
    assert!(out.contains("MODEL"), "{out}");
}

fn shoal(dir: &std::path::Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.args(args).current_dir(dir).env_clear().env("HOME", dir).env("XDG_RUNTIME_DIR", dir.join("run"));
    command.output().expect("it starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn without_a_file_a_sample_is_printed() {
    let dir = tempfile::tempdir().expect("a directory");
    let output = shoal(dir.path(), &["serve"]);
    assert_eq!(output.status.code(), Some(2));
    let errors = text(&output.stderr);
    assert!(
        errors.contains("no shoal.toml: looked for ") && errors.contains(".config/shoal/shoal.toml"),
        "{errors}"
    );
    assert!(errors.contains("[[model]]"), "{errors}");
}

#[test]
fn a_port_in_use_is_told_before_anything_starts() {
    let dir = tempfile::tempdir().expect("a directory");
    let other = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let listen = other.local_addr().expect("bound");
    let file = format!("[server]\nlisten='{listen}'\ndevice='sim'\n[[model]]\nname='a'\nsource='a'\n");
    std::fs::write(dir.path().join("shoal.toml"), file).expect("written");
    let output = shoal(dir.path(), &["serve"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    assert!(errors.contains(&format!("{listen} is in use by another program")), "{errors}");
    assert!(!dir.path().join("run").exists(), "nothing was started");
}

#[test]
fn keys_are_required_beyond_loopback_and_must_be_good() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |server: &str| {
        let file = format!("[server]\ndevice='sim'\n{server}\n[[model]]\nname='a'\nsource='a'\n");
        std::fs::write(dir.path().join("shoal.toml"), file).expect("written");
    };
    write("listen='0.0.0.0:0'");
    let output = shoal(dir.path(), &["serve"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("which other machines can reach"), "{}", text(&output.stderr));
    write("listen='0.0.0.0:0'\napi_key_file='keys'");
    for (keys, expected) in
        [(None, "No such file"), (Some("# none\n"), "holds no key"), (Some("short\n"), "line 1")]
    {
        if let Some(keys) = keys {
            std::fs::write(dir.path().join("keys"), keys).expect("written");
        }
        let output = shoal(dir.path(), &["serve"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
    std::fs::write(dir.path().join("keys"), format!("{KEY}\n")).expect("written");
    let output = shoal(dir.path(), &["serve", "--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let out = text(&output.stdout);
    assert!(out.contains("1 key (key 1);") && out.contains("chmod 600") && !out.contains(KEY), "{out}");
}

#[test]
fn a_server_that_was_killed_is_told_apart_from_none() {
    let dir = tempfile::tempdir().expect("a directory");
    let output = shoal(dir.path(), &["ps"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no server runs here"), "{}", text(&output.stderr));
    std::fs::create_dir_all(dir.path().join("run/shoal")).expect("made");
    let file = r#"{"pid":1,"address":"127.0.0.1:1","url":"http://127.0.0.1:1","version":"0"}"#;
    std::fs::write(dir.path().join("run/shoal/server.json"), file).expect("written");
    let output = shoal(dir.path(), &["ps"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("may have been killed"), "{}", text(&output.stderr));
}
