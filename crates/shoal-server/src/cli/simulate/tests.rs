//! `shoal simulate` through the command line.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cli::run_to;

const SHELF: &str = "[server]\ndevice_budget = '20GiB'\nquantum = '2s'\nwait_s_max = 60\n\
    [[model]]\nname = 'chat'\nsource = 'org/chat'\npriority = 1\n\
    [[model]]\nname = 'code'\nsource = 'org/code'\n";
const SIZES: [&str; 4] = ["--size", "chat=12GiB", "--size", "code=10GiB"];

/// A directory with a configuration.
struct Shelf(tempfile::TempDir);

impl Shelf {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("shelf.toml"), text).expect("written");
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn said(&self, args: &[&str]) -> (i32, String, String) {
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let file = self.path("shelf.toml");
        let begin = ["shoal", "simulate", file.to_str().expect("text")];
        let args = begin.iter().chain(args).map(|arg| (*arg).to_owned()).collect();
        let code = run_to(args, &mut out, &mut errors);
        (code, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&errors).into_owned())
    }

    fn json(&self, args: &[&str]) -> Value {
        let (code, out, errors) = self.said(&[args, &["--json"]].concat());
        assert_eq!(code, 0, "{errors}");
        serde_json::from_str(&out).expect("one JSON document")
    }

    fn refused(&self, args: &[&str]) -> String {
        let (code, out, errors) = self.said(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {errors}");
        errors
    }

    fn trace(&self, text: &str) -> String {
        std::fs::write(self.path("trace.ndjson"), text).expect("written");
        self.path("trace.ndjson").display().to_string()
    }
}

fn sized<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SIZES[..], more].concat()
}

#[test]
fn one_input_gives_one_output() {
    let shelf = Shelf::new(SHELF);
    let args = sized(&["--seed", "7", "--minutes", "20", "--why"]);
    let once = shelf.said(&args);
    assert_eq!(once.0, 0, "{}", once.2);
    assert_eq!(once, shelf.said(&args));
    assert_ne!(once.1, shelf.said(&sized(&["--seed", "8", "--minutes", "20", "--why"])).1);
    for expected in [
        "made from seed 7: conversations, about 30 a minute for 20 minutes",
        "device: 20 GiB for all models, of it 832 MiB for each worker's process (--overhead)",
        "host memory has a copy of every model",
        "chat 12 GiB (command line), back in 0.504 s",
        "\npolicy value\nMODEL",
        "\nwhole-model LRU, with the same speeds\nMODEL",
        "\nwhole-model LRU over value: first token p50 ",
        " s  chat is woken: 1 request waits for chat; 12 GiB of its 12 GiB are missing\n",
    ] {
        assert!(once.1.contains(expected), "{expected:?} is not in\n{}", once.1);
    }
}

#[test]
fn a_trace_is_played_as_it_is_written() {
    let shelf = Shelf::new(SHELF);
    let trace = shelf.trace(
        "{\"at_s\": 30, \"model\": \"code\"}\n{\"at_s\": 0, \"model\": \"chat\", \"prompt_tokens\": 1000}\n\
         {\"at_s\": 10, \"model\": \"chat\", \"prompt_tokens\": 1000, \"max_tokens\": 50}\n",
    );
    let said = shelf.json(&sized(&["--trace", &trace, "--prefill-tokens-s", "2000", "--overhead", "0B"]));
    let result = &said["result"];
    // 12 GiB at 41 us a MiB, then a prompt of 1,000 tokens; the second time it is there.
    assert_eq!(result["models"][0]["first_token_s"]["max"], 0.504 + 0.5);
    assert_eq!(result["models"][0]["first_token_s"]["p50"], 1.004);
    assert_eq!(result["models"][0]["served"], 2);
    // 8 GiB are free, and only what is missing is taken.
    assert_eq!(result["total"]["moved_bytes"], 22u64 << 30);
    assert_eq!(result["total"]["evictions"], 1);
    assert_eq!(said["trace"]["requests"], 3);
    assert!(said["trace"].get("seed").is_none() && said.get("decisions").is_none());
    let why = shelf.json(&sized(&["--trace", &trace, "--why", "--overhead", "0B"]));
    let evict = why["decisions"].as_array().expect("all of them").iter().find(|one| one["do"] == "evict");
    let evict = evict.expect("chat goes for code");
    assert_eq!(
        (&evict["model"], &evict["at_s"], &evict["bytes"]),
        (&"chat".into(), &30.0.into(), &(2u64 << 30).into())
    );
    assert!(
        evict["reason"].as_str().is_some_and(|why| why.starts_with("code needs 10 GiB for weights")),
        "{evict}"
    );
}

#[test]
fn a_trace_begins_with_its_first_request() {
    let shelf = Shelf::new(SHELF);
    let from = |at_s: u64| {
        let lines = format!(
            "{{\"at_s\": {at_s}, \"model\": \"chat\"}}\n{{\"at_s\": {}, \"model\": \"code\"}}\n",
            at_s + 30
        );
        let mut said = shelf.json(&sized(&["--trace", &shelf.trace(&lines), "--why"]));
        said.as_object_mut().expect("a document").remove("trace");
        said
    };
    assert_eq!(from(0), from(1_000_000), "whatever the log counts from");
}

#[test]
fn a_wrong_trace_is_refused_with_its_line() {
    let shelf = Shelf::new(SHELF);
    for (text, expected) in [
        ("{\"at_s\": 0, \"model\": \"chat\"}\nnonsense\n", "trace.ndjson: line 2: not JSON"),
        (
            "{\"at_s\": 0, \"model\": \"chad\"}\n",
            "line 1: `model` is \"chad\"; the configuration has chat, code",
        ),
        ("{\"at_s\": 0}\n", "line 1 lacks `model`"),
        ("\n", "trace.ndjson: there is no request in it"),
    ] {
        let errors = shelf.refused(&sized(&["--trace", &shelf.trace(text)]));
        assert!(errors.contains(expected), "{text}: {errors}");
    }
    std::fs::write(shelf.path("bytes"), b"{\"at_s\": 0, \"model\": \"chat\"}\n\n\xff").expect("written");
    let bytes = shelf.path("bytes").display().to_string();
    assert!(shelf.refused(&sized(&["--trace", &bytes])).contains("bytes: line 3 is not UTF-8"));
    let missing = shelf.refused(&sized(&["--trace", "/nowhere/trace"]));
    assert!(missing.contains("/nowhere/trace: No such file"), "{missing}");
    let both = shelf.refused(&sized(&["--trace", &bytes, "--seed", "3"]));
    assert!(both.contains("cannot be used with"), "{both}");
}

/// Weights of 64 MiB in floats of four bytes.
fn write_weights(dir: &Path) {
    let header = r#"{"w":{"dtype":"F32","shape":[16777216],"data_offsets":[0,67108864]}}"#;
    let mut weights = (header.len() as u64).to_le_bytes().to_vec();
    weights.extend(header.as_bytes());
    std::fs::create_dir_all(dir).expect("made");
    std::fs::write(dir.join("model.safetensors"), weights).expect("written");
}

#[test]
fn sizes_come_from_files_or_from_whoever_knows_them() {
    let model = |device: &str| {
        format!(
            "[server]\n{device}\n[[model]]\nname = 'here'\nsource = './here'\n[[model]]\nname = 'gone'\nsource = 'org/gone'\n"
        )
    };
    let shelf = Shelf::new(&model("device = 'cuda:3'\ndevice_budget = '20GiB'"));
    write_weights(&shelf.path("here"));
    let errors = shelf.refused(&[]);
    assert!(
        errors.contains("files are not here: gone (org/gone); say it, as in --size gone=15GiB"),
        "{errors}"
    );
    assert!(!errors.contains("./here"), "{errors}");
    let said = shelf.json(&["--size", "gone=3GiB"]);
    let sizes = |said: &Value| -> Vec<(u64, String)> {
        let of = |model: &Value| {
            (
                model["weights_bytes"].as_u64().unwrap_or(0),
                model["size_from"].as_str().unwrap_or("").to_owned(),
            )
        };
        said["models"].as_array().expect("both").iter().map(of).collect()
    };
    let gone = (3u64 << 30, "command line".to_owned());
    assert_eq!(sizes(&said), [(32 << 20, "files".to_owned()), gone.clone()], "floats of two bytes on a GPU");
    assert_eq!(said["assumes"]["overhead"], 832u64 << 20);
    let larger = shelf.json(&["--size", "gone=3GiB", "--size", "here=1GiB"]);
    assert_eq!(sizes(&larger)[0], (1 << 30, "command line".to_owned()));

    let simulated = Shelf::new(&model("device = 'sim'\ndevice_budget = '20GiB'"));
    write_weights(&simulated.path("here"));
    let said = simulated.json(&["--size", "gone=3GiB"]);
    assert_eq!(sizes(&said), [(64 << 20, "files".to_owned()), gone], "as they are in its files");
    assert_eq!(said["assumes"]["overhead"], 0);
}

#[test]
fn the_machine_is_what_is_said_of_it() {
    let shelf = Shelf::new(&SHELF.replace("device_budget = '20GiB'", "device = 'auto'"));
    let errors = shelf.refused(&sized(&[]));
    assert!(errors.contains("--device-budget 72GiB, or `device_budget` under [server]"), "{errors}");
    let small = shelf.json(&sized(&["--device-budget", "14GiB", "--seed", "3"]));
    let large = shelf.json(&sized(&["--device-budget", "40GiB", "--seed", "3"]));
    let moved = |said: &Value| said["result"]["total"]["moved_bytes"].as_u64().expect("a number");
    assert_eq!(moved(&large), 22 << 30, "each comes once");
    assert!(moved(&small) > 10 * moved(&large));
    assert!(large["ratio"]["moved"] == 1.0 && large["ratio"]["thrash"].is_null(), "{}", large["ratio"]);
    // Half of what both need: the rest is read from their files.
    let poor =
        shelf.json(&sized(&["--device-budget", "40GiB", "--host-budget", "11GiB", "--source-gib-s", "1"]));
    for place in 0..2 {
        let (poor, rich) = (&poor["models"][place], &large["models"][place]);
        assert!(poor["host_part"].as_f64() < Some(0.6) && rich["host_part"] == 1.0, "{poor}");
        assert!(poor["wake_s"].as_f64() > Some(4.0) && rich["wake_s"].as_f64() < Some(0.6), "{poor} {rich}");
    }
    let lean = shelf.refused(&sized(&["--device-budget", "1GiB"]));
    assert!(lean.contains("processes of 2 models take 832 MiB each"), "{lean}");
}

#[test]
fn who_can_never_be_there_is_said() {
    let shelf = Shelf::new(SHELF);
    let (code, out, errors) = shelf.said(&["--size", "chat=12GiB", "--size", "code=40GiB"]);
    assert_eq!(code, 0, "{errors}");
    assert!(out.contains("requests refused: code needs 40 GiB for weights"), "{out}");
    assert!(out.contains("the budget is 20 GiB"), "{out}");
}

#[test]
fn programs_take_what_the_configuration_says_and_start_in_their_own_time() {
    let shelf = Shelf::new(
        "[server]\ndevice_budget = '20GiB'\n[[model]]\nname = 'big'\nengine = 'command'\ncommand = 'serve-it'\n\
         source = 'big'\nport = 9000\ndevice_bytes = '16GiB'\n",
    );
    let said = shelf.json(&["--start", "big=40"]);
    assert_eq!(
        (&said["models"][0]["size_from"], &said["models"][0]["weights_bytes"]),
        (&"configuration".into(), &(16u64 << 30).into())
    );
    assert!(said["models"][0]["wake_s"].as_f64().is_some_and(|wake| (wake - 40.0).abs() < 0.1), "{said}");
    let wrong = Shelf::new(SHELF).refused(&sized(&["--start", "chat=5"]));
    assert!(wrong.contains("\"chat\" is no engine = \"command\""), "{wrong}");
}

#[test]
fn what_cannot_be_played_is_refused_with_a_reason() {
    let shelf = Shelf::new(SHELF);
    for (args, expected) in [
        (vec!["--size", "chad=1GiB"], "--size: there is no model \"chad\"; there are chat, code"),
        (vec!["--size", "chat"], "has no `=` after a model's name"),
        (vec!["--size", "chat=big"], "is not a size"),
        (vec!["--minutes", "0"], "must be more than 0"),
        (vec!["--minutes", "20000", "--rate", "60000"], "are more than 1000000"),
        (vec!["--minutes", "0.001", "--rate", "0.001"], "came to none"),
        (vec!["--link-gib-s=-1"], "must lie between"),
        (vec!["--pattern", "waves"], "possible values: conversations, steady, rounds"),
        (vec!["--policy", "best"], "there is no policy \"best\"; there are value, lru, and python:"),
        (vec!["--size", "code=20TiB"], "20 TiB is more than any device has"),
    ] {
        let errors = shelf.refused(&sized(&args));
        assert!(errors.contains(expected), "{args:?} said {errors}");
    }
    let broken = Shelf::new("[server]\ndevise = 'sim'\n").refused(&[]);
    assert!(broken.contains("shelf.toml:2:1: unknown key `devise`"), "{broken}");
}
