use std::path::Path;
use std::time::Duration;

use shoal_core::bytes::ByteCount;

use super::*;

fn surroundings(dir: &Path) -> Surroundings {
    Surroundings {
        working_dir: dir.join("work"),
        home: Some(dir.join("home")),
        config_home: Some(dir.join("config")),
        state_home: dir.join("state"),
        cache_home: dir.join("cache"),
        runtime_dir: dir.join("run"),
        python: "python3".into(),
        memory: MachineMemory { total: ByteCount::gib(64), available: ByteCount::gib(32), cgroup_left: None },
        shared_memory: None,
        nvidia: None,
        gpus: None,
        budgets_before: None,
    }
}

fn load(text: &str, surroundings: &Surroundings) -> Result<ServerConfig, String> {
    let file = Path::new("/etc/shelf/shoal.toml");
    parse(text)
        .and_then(|sections| sections.resolve(file, surroundings))
        .map_err(|problems| ConfigError::Wrong { file: file.to_owned(), problems }.to_string())
}

pub(super) fn load_here(text: &str) -> Result<ServerConfig, String> {
    load(text, &surroundings(Path::new("/nowhere")))
}

#[test]
fn a_command_has_its_keys_and_defaults() {
    let text = "[[model]]\nname = 'a'\nengine = 'command'\ncommand = 'llama-server'\ndevice_bytes = '3GiB'\n";
    let config = load_here(&format!("{text}args = ['--port', '{{port}}']")).expect("good");
    let model = config.model("a").expect("listed");
    assert_eq!((model.engine, model.source.as_str()), (Engine::Command, "llama-server --port {port}"));
    let command = CommandConfig {
        program: "llama-server".into(),
        port: None,
        socket: false,
        health: "/health".to_owned(),
        ready_max: Duration::from_mins(10),
        stop_max: Duration::from_secs(10),
        device_bytes: ByteCount::gib(3),
    };
    assert_eq!(model.command, Some(command.clone()));
    let more = "env = { SOCKET = '{socket}' }\nsocket = true\nhealth = '/v1/models'\nready_s_max = '2m'\nstop_s_max = 3";
    let config =
        load_here(&format!("{}{more}", text.replace("'llama-server'", "'./bin/serve'"))).expect("good");
    let expected = CommandConfig {
        program: "/etc/shelf/bin/serve".into(),
        socket: true,
        health: "/v1/models".to_owned(),
        ready_max: Duration::from_mins(2),
        stop_max: Duration::from_secs(3),
        ..command
    };
    assert_eq!(config.model("a").and_then(|model| model.command.clone()), Some(expected));
    let small = load_here(&format!("[server]\ndevice_budget = '1GiB'\n{text}port = 8080")).expect("good");
    assert_eq!(
        small.unservable,
        [
            "model \"a\" will fail: its device_bytes are 3221225472 bytes (3 GiB), and device_budget is 1073741824 bytes \
          (1 GiB)"
        ]
    );
}

#[test]
fn keys_can_be_kept_apart_where_there_are_any() {
    let text =
        "[server]\nseparate_keys = true\nAND[[model]]\nname = 'a'\nsource = 'org/a'\nparallel_max = 4\n";
    let config = load_here(&text.replace("AND", "api_key_file = 'keys'\n")).expect("good");
    assert_eq!((config.separate_keys, config.models[0].parallel_max), (true, 4));
    assert!(!config.notes.iter().any(|note| note.contains("separate_keys")), "{:?}", config.notes);
    let notes = |engine: &str| {
        let text = text.replace("AND", "api_key_file = 'keys'\n") + engine;
        let notes = load_here(&text).expect("good").notes;
        notes.into_iter().filter(|note| note.contains("separate_keys")).collect::<Vec<_>>()
    };
    assert_eq!(notes("engine = 'vllm'\n"), [] as [String; 0], "it is told of keys too");
    let told = notes("engine = 'command'\ncommand = 'serve'\nport = 9000\ndevice_bytes = '1GiB'\n");
    assert!(told[0].contains("separate_keys: a (engine = \"command\")"), "{told:?}");
    let on_disk = text.replace("AND", "api_key_file = 'keys'\ndisk = [{ path = 'kv', bytes = '1GiB' }]\n");
    let told = load_here(&on_disk).expect("good").notes;
    assert!(told.iter().any(|note| note.contains("the next one has other salts")), "{told:?}");
    let wrong = load_here(&text.replace("AND", "")).expect_err("there are no keys");
    assert!(wrong.contains("there are no keys to tell apart without `api_key_file`"), "{wrong}");
    let none =
        load_here(&text.replace("AND", "").replace("true", "false").replace('4', "0")).expect_err("no place");
    assert!(none.contains("`parallel_max`"), "{none}");
    let plain = load_here("[[model]]\nname = 'a'\nsource = 'org/a'\n").expect("good");
    assert_eq!((plain.separate_keys, plain.models[0].parallel_max), (false, PARALLEL_DEFAULT));
}

#[test]
fn silence_has_bounds_and_may_be_allowed_for_ever() {
    let with =
        |server: &str| load_here(&format!("[server]\n{server}\n[[model]]\nname = 'a'\nsource = 'org/a'\n"));
    let read = |server: &str| with(server).expect("good").patience;
    assert_eq!(read(""), Patience::default());
    let chosen = read("silent_s_max = 20\nstuck_s_max = '2m'");
    assert_eq!(chosen.silent_max, Some(Duration::from_secs(20)));
    assert_eq!(chosen.stuck_max, Some(Duration::from_mins(2)));
    assert_eq!(read("silent_s_max = 0\nstuck_s_max = 0"), Patience { silent_max: None, stuck_max: None });
    for (wrong, says) in [
        ("silent_s_max = 4", "`silent_s_max`: must be 0 (never), or between 5 s and 24 h"),
        ("stuck_s_max = '25h'", "`stuck_s_max`: must be 0 (never), or between 10 s and 24 h"),
    ] {
        let error = with(wrong).expect_err(wrong);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_policy_may_be_a_function_of_python() {
    let with =
        |server: &str| load_here(&format!("[server]\n{server}\n[[model]]\nname = 'a'\nsource = 'org/a'\n"));
    let config =
        with("policy = 'python:house.rules:plan'\nshadow = 'python:other.plan'\npolicy_wait = '250ms'");
    let sharing = config.expect("good").sharing;
    assert_eq!(sharing.policy, "python:house.rules:plan");
    assert_eq!(sharing.shadow.as_deref(), Some("python:other:plan"), "a point may stand for the colon");
    assert_eq!(sharing.policy_wait, Duration::from_millis(250));
    assert!(is_outside(&sharing.policy) && !is_outside("value"));
    for (wrong, says) in [
        ("policy = 'python:'", "names no function of a module"),
        ("policy = 'python:plan'", "names no function of a module"),
        ("policy = 'python:a b:plan'", "names no function of a module"),
        ("shadow = 'python:a:2x'", "write \"python:package.module:function\""),
        ("policy = 'valeu'", "did you mean \"value\"?; or \"python:MODULE:FUNCTION\", a function of Python"),
        ("policy_wait = '11s'", "`policy_wait`: 11s does not lie between 1 ms and 10 s"),
    ] {
        let error = with(wrong).expect_err(wrong);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn the_shortest_file_gets_every_default() {
    let config = load_here("[[model]]\nname = 'chat'\nsource = 'org/chat'\n").expect("good");
    assert_eq!(config.listen.to_string(), LISTEN_DEFAULT);
    assert_eq!(config.device, DeviceChoice::Sim);
    assert_eq!((config.device_budget, config.host_budget), (ByteCount::gib(8), ByteCount::gib(16)));
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.quantum, QUANTUM_DEFAULT);
    assert_eq!(config.runtime_dir, Path::new("/nowhere/run"));
    assert_eq!(config.log_dir, Path::new("/nowhere/state/shoal/logs"));
    assert!(config.notes.is_empty(), "{:?}", config.notes);
    let model = config.model("chat").expect("listed");
    assert_eq!((model.source.as_str(), model.engine, model.priority), ("org/chat", Engine::Transformers, 0));
    assert_eq!(config.python_of(model), Path::new("python3"));
}

#[test]
fn every_key_is_read() {
    let config = load_here(
        r#"
        [server]
        listen = "0.0.0.0:9000"
        api_key_file = "keys.txt"
        allowed_hosts = ["shelf.example"]
        device = "sim"
        device_budget = "640MiB"
        host_budget = 1073741824
        host_tier = "256MiB"
        disk = [{ path = "~/disk", bytes = "200GiB" }]
        disk_wait = "250ms"
        tier_load = "always"
        tier_idle = 0
        request_bytes_max = "1MiB"
        wait_s_max = 30
        quantum = "750ms"
        parked_max = 7
        policy = "lru"
        shadow = "value"
        evict = "never"
        [[model]]
        name = "code:v1"
        source = "./models/../code"
        revision = "main"
        engine = "transformers"
        python = "../venv/bin/python"
        env = { OMP_NUM_THREADS = "2" }
        args = ["--verbose"]
        dtype = "float32"
        context = 2048
        prefix_caching = false
        pin = true
        min = "64MiB"
        max = "1GiB"
        priority = -3
        keep_alive = "10m"
        preload = true
        sleep = "host"
        [[model]]
        name = "other"
        source = "org/other"
        apart = ["third"]
        [[model]]
        name = "third"
        source = "org/third"
        "#,
    )
    .expect("good");
    assert_eq!(config.api_key_file.as_deref(), Some(Path::new("/etc/shelf/keys.txt")));
    assert_eq!(
        config.disk,
        [DiskTier {
            path: "/nowhere/home/disk".into(),
            bytes: ByteCount::gib(200),
            write_bytes_per_hour: ByteCount::gib(200),
            weights: None,
        }]
    );
    assert_eq!((config.device_budget, config.host_budget), (ByteCount::mib(640), ByteCount::gib(1)));
    assert_eq!(
        config.limits,
        Limits { request_bytes_max: ByteCount::mib(1), wait_max: Duration::from_secs(30), parked_max: 7 }
    );
    assert!(config.notes.is_empty(), "{:?}", config.notes);
    let told = |name: &str| config.spec_of(config.model(name).expect("it is there"))["disk"].clone();
    assert!(told("code:v1").is_null(), "it finds nothing again");
    assert_eq!(config.disk_wait, Duration::from_millis(250));
    assert_eq!((config.tiers.load(), config.tiers.idle), ("always", None));
    assert_eq!(config.host_tier, HostTier::Of(ByteCount::mib(256)));
    let part = |name: &str| config.host_tier_part(config.model(name).expect("it is there"));
    assert_eq!(["code:v1", "other", "third"].map(part).map(|part| part.0 >> 20), [0, 128, 128]);
    let half = ByteCount::gib(100);
    let other = serde_json::json!([{"path": "/nowhere/home/disk/kv-other", "bytes": half, "write_bytes_per_hour": half}]);
    assert_eq!(told("other"), other, "two models share it");
    assert_eq!(config.unservable, ["model \"code:v1\" will fail: there is no /etc/shelf/code"]);
    let model = &config.models[0];
    assert_eq!(model.source, "/etc/shelf/code");
    assert_eq!(model.python.as_deref(), Some(Path::new("/etc/venv/bin/python")));
    assert_eq!(model.env["OMP_NUM_THREADS"], "2");
    assert_eq!((model.context, model.pin, model.priority), (Some(2048), true, -3));
    assert!(!model.prefix_caching && config.models[1].prefix_caching);
    assert_eq!((model.min, model.max), (Some(ByteCount::mib(64)), Some(ByteCount::gib(1))));
    assert_eq!(model.keep_alive_s, Some(600));
    assert_eq!((model.preload, model.sleep), (true, SleepDepth::Host));
    let sharing = Sharing {
        policy: "lru".to_owned(),
        shadow: Some("value".to_owned()),
        evicts: false,
        ..Sharing::default()
    };
    assert_eq!(config.sharing, sharing);
    let apart = |name: &str| config.model(name).expect("listed").apart.clone();
    assert_eq!(
        (apart("other"), apart("third")),
        (vec!["third".to_owned()], vec!["other".to_owned()]),
        "both ways"
    );
}

#[test]
fn sharing_that_contradicts_itself_is_told_with_its_line() {
    let two = |first: &str, second: &str| {
        format!(
            "[[model]]\nname = 'a'\nsource = 'org/a'\n{first}\n[[model]]\nname = 'b'\nsource = 'org/b'\n{second}\n"
        )
    };
    for (text, says) in [
        (two("apart = ['c']", ""), ":4:10: `apart`: there is no model \"c\"; there are \"a\", \"b\""),
        (two("apart = ['a']", ""), ":4:10: `apart`: a model cannot stand apart from itself"),
        (
            two("apart = ['b']", "pin = true"),
            ":4:10: `apart`: \"a\" and \"b\" are never on the device together, but `pin` keeps \"b\" there",
        ),
        (two("apart = ['b']\nmin = '1MiB'", ""), "but `min` keeps \"a\" there; leave one of the two out"),
        (
            two("sleep = 'none'", "apart = ['a']"),
            ":8:10: `apart`: \"b\" and \"a\" are never on the device together, but `sleep = \"none\"` keeps \"a\" there",
        ),
        (
            two("apart = 'b'", ""),
            ":4:9: `apart` must be a list of models' names, such as [\"code\"], not a string",
        ),
        (two("apart = [1]", ""), ":4:10: `apart` must be a list of models' names"),
        (two("sleep = 'disk'", ""), ":4:9: `sleep`: \"disk\" is none of \"none\", \"host\", \"source\""),
        (
            two("sleep = 'none'\nkeep_alive = 5", ""),
            ":5:14: `keep_alive`: puts the model to sleep, and sleep = \"none\" says that it does not",
        ),
        (two("preload = 1", ""), ":4:11: `preload` must be true or false, not a whole number"),
        (
            format!("[server]\npolicy = 'value2'\n{}", two("", "")),
            ":2:10: `policy`: \"value2\" is none of \"value\", \"lru\"; did you mean \"value\"?",
        ),
        (
            format!("[server]\nshadow = 3\n{}", two("", "")),
            ":2:10: `shadow` must be a string, not a whole number",
        ),
        (
            format!("[server]\nevict = 'no'\n{}", two("", "")),
            ":2:9: `evict`: \"no\" is none of \"auto\", \"never\"",
        ),
    ] {
        let said = load_here(&text).expect_err(says);
        assert!(said.contains(says), "{said}\n{says}");
    }
    assert!(load_here(&two("apart = ['b']\nkeep_alive = 5\npreload = true", "")).is_ok());
}

#[test]
fn copies_that_are_to_stay_in_host_memory_have_to_fit_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let header = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,209715200]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    std::fs::write(dir.path().join("model.safetensors"), bytes).expect("written");
    let model = |name: &str| {
        format!("[[model]]\nname = '{name}'\nsource = '{}'\nsleep = 'host'\n", dir.path().display())
    };
    let text = |budget: &str| format!("[server]\nhost_budget = '{budget}'\n{}{}", model("a"), model("b"));
    assert!(load_here(&text("500MiB")).is_ok());
    let said = load_here(&text("400MiB")).expect_err("too little");
    assert!(
        said.contains(
            ":10:9: `sleep`: the copies that are to stay in host memory need 438.2 MiB, this one included"
        ),
        "{said}"
    );
}

/// Text after `[server]`, or a whole file where it names a model; then what must be said of it, line included.
#[test]
fn mistakes_are_named_with_their_line() {
    let model = "\n[[model]]\nname = 'a'\nsource = 'a'\n";
    let cases: &[(&str, &str)] = &[
        ("[server]\nlisten = 8000", ":2:10: `listen` must be a string, not a whole number"),
        ("[server]\nlisten = 'localhost'", ":2:10: `listen`: \"localhost\" is not an address and a port"),
        (
            "[server]\ndevice_bugdet = '1GiB'",
            ":2:1: unknown key `device_bugdet` in [server]; did you mean `device_budget`?",
        ),
        ("[server]\nxyzzy = 1", ":2:1: unknown key `xyzzy` in [server]"),
        ("[sever]\n", ":1:2: unknown key `sever` in the file; did you mean `server`?"),
        ("[server]\ndevice_budget = '12 parsecs'", ":2:17: `device_budget`: \"12 parsecs\" is not a size"),
        ("[server]\ndevice_budget = -5", ":2:17: `device_budget`: a size cannot be negative"),
        ("[server]\ndevice_budget = '0'", "must be more than zero"),
        ("[server]\ndevice_budget = 1.5", "`device_budget` must be a size"),
        ("[server]\ndevice = 'gpu'", "write \"auto\", \"sim\" or \"cuda:0\""),
        ("[server]\ndevice = 'cuda:0'", "device = \"cuda:0\", but there is no NVIDIA device here"),
        ("[server]\nparked_max = 0", "must lie between 1 and"),
        (
            "[server]\nlisten = '0.0.0.0:80'",
            ":2:10: `listen` is 0.0.0.0:80, which other machines can reach, so `api_key_file`",
        ),
        ("server = 3", "`server` must be a table"),
        ("[server]\nlisten = '127.0.0.1:1'\nlisten = '127.0.0.1:2'", ":3:1: duplicate key"),
        ("[server]\ndevice = ", ":2:"),
        ("[[model]]\nname = 'a'\nsource = 'b'", ":5:8: two models are named \"a\" (the first in line 2)"),
        ("[[model]]\nsource = 'b'", ":1:1: [[model]] lacks `name`"),
        ("[[model]]\nname = 'b'", "[[model]] \"b\" lacks `source`"),
        ("[[model]]\nname = 'b/c'\nsource = 'b'", ":2:8: `name`: \"b/c\" is not a name"),
        ("[[model]]\nname = '..'\nsource = 'b'", "is not a name"),
        ("[[model]]\nname = 'b'\nsource = ''", "`source`: must not be empty"),
        (
            "[[model]]\nname = 'b'\nsource = 'b'\nengin = 'x'",
            ":4:1: unknown key `engin` in [[model]] \"b\"; did you mean `engine`?",
        ),
        ("[[model]]\nname = 'b'\nsource = 'b'\nengine = 'tranformers'", "did you mean \"transformers\"?"),
        ("[[model]]\nname = 'b'\nengine = 'vllm'", "lacks `source`"),
        (
            "[[model]]\nname = 'b'\nsource = 'b'\nengine = 'vllm'\nargs = ['--max-num-seqs', '8', '--port=1']",
            "`args`: vLLM's --port is set by the server; leave it out",
        ),
        (
            "[[model]]\nname = 'b'\nsource = 'b'\nengine = 'vllm'\nargs = ['--gpu_memory_utilization', '0.5']",
            "leave it out, and set `max` where the model is to have less",
        ),
        ("[[model]]\nname = 'b'\nsource = 'b'\nengine = 'worker'", "needs the command in `args`"),
        ("[[model]]\nname = 'b'\nengine = 'command'", "lacks `command`"),
        ("[[model]]\nname = 'b'\nengine = 'command'\ncommand = 'x'", "lacks `device_bytes`"),
        ("[[model]]\nname = 'b'\nengine = 'comand'", "did you mean \"command\"?"),
        (
            "[[model]]\nname = 'b'\nengine = 'command'\ncommand = 'x'\ndevice_bytes = '1GiB'",
            "nothing tells the command its port: write {port} where it belongs",
        ),
        (
            "[[model]]\nname = 'b'\nengine = 'command'\ncommand = 'x'\ndevice_bytes = '1GiB'\nsocket = true",
            "nothing tells the command its socket",
        ),
        (
            "[[model]]\nname = 'b'\nengine = 'command'\ncommand = 'x'\ndevice_bytes = '1GiB'\nsocket = true\nport = 1",
            "exclude each other",
        ),
        (
            "[[model]]\nname = 'b'\nengine = 'command'\ncommand = 'x'\ndevice_bytes = '1GiB'\nport = 65536",
            "must lie between 1 and 65535",
        ),
        (
            "[[model]]\nname = 'b'\nengine = 'command'\ncommand = 'x'\ndevice_bytes = '1GiB'\nport = 1\nhealth = 'up'",
            "is not a path",
        ),
        ("[[model]]\nname = 'b'\nsource = 'b'\nport = 8", "`port`: is for engine = \"command\""),
        ("[[model]]\nname = 'b'\nsource = 'b'\ndtype = 'int3'", "`dtype`: \"int3\" is none of"),
        ("[[model]]\nname = 'b'\nsource = 'b'\ncontext = -1", "`context`: must lie between 1 and"),
        ("[[model]]\nname = 'b'\nsource = 'b'\npin = 'yes'", "`pin` must be true or false, not a string"),
        ("[[model]]\nname = 'b'\nsource = 'b'\nenv = { A = 1 }", "`env.A` must be a string"),
        ("[[model]]\nname = 'b'\nsource = 'b'\nargs = [1]", "`args` must be a list of strings"),
        (
            "[[model]]\nname = 'b'\nsource = 'b'\nmin = '2GiB'\nmax = '1GiB'",
            ":4:7: `min`: 2 GiB is more than `max`, 1 GiB",
        ),
        (
            "[[model]]\nname = 'b'\nsource = 'b'\nmin = '900GiB'",
            "`min`: 900 GiB is more than the device budget of 8 GiB",
        ),
        (
            "[[model]]\nname = 'b'\nsource = 'b'\nmin = '5GiB'\n[[model]]\nname = 'c'\nsource = 'c'\nmin = '5GiB'",
            "`min` add up to 10 GiB",
        ),
        ("[[model]]\nname = 'b'\nsource = 'b'\nkeep_alive = 'long'", "`keep_alive`: write whole seconds"),
        ("[[model]]\nname = 'b'\nsource = 'b'\npriority = 99999999999", "`priority`: must lie between"),
    ];
    are_said(cases, model);
}

fn are_said(cases: &[(&str, &str)], model: &str) {
    for (text, expected) in cases {
        let said = load_here(&format!("{text}{model}")).expect_err(text);
        assert!(said.contains(expected), "{text:?}\n said {said}\n not {expected}");
        assert!(said.starts_with("/etc/shelf/shoal.toml"), "{said}");
    }
}

#[test]
fn mistakes_of_the_disk_tier_are_named_with_their_line() {
    let cases: &[(&str, &str)] = &[
        ("[server]\ndisk = '/tmp'", "`disk` must be a list of tables"),
        ("[server]\ndisk = [{ path = '/tmp' }]", ":2:9: `disk` lacks `bytes`"),
        ("[server]\ntier_load = 'slow'", "`tier_load`: \"slow\" is none of \"fastest\", \"always\""),
        ("[server]\ntier_idle = '25h'", "`tier_idle`: 90000s does not lie between 0 ms and 24 h"),
        ("[server]\ndisk_wait = '2m'", "`disk_wait`: 120s does not lie between 1 ms and 60 s"),
        ("[server]\ndisk = [{ bytes = '1GiB' }]", ":2:9: `disk` lacks `path`"),
        (
            "[server]\ndisk = [{ path = '/tmp', bytes = '1MiB' }]",
            "`bytes`: 1 MiB is too little: at least 64 MiB",
        ),
        ("[server]\ndisk = [{ path = '/dev/null', bytes = '1GiB' }]", "`path`: /dev/null is not a directory"),
        (
            "[server]\ndisk = [{ path = '/a', bytes = '1GiB' }, { path = '/b/../a', bytes = '1GiB' }]",
            "`path`: /a is named twice, or lies in the one before",
        ),
        (
            "[server]\ndisk = [{ path = '/a', bytes = '1GiB' }, { path = '/a/b', bytes = '1GiB' }]",
            "`path`: /a/b is named twice, or lies in the one before",
        ),
    ];
    are_said(cases, "\n[[model]]\nname = 'a'\nsource = 'a'\n");
}

#[test]
fn entries_of_the_disk_tier_that_links_make_one_are_refused() {
    let scratch = tempfile::tempdir().expect("scratch");
    let root = scratch.path().canonicalize().expect("it is there");
    std::fs::create_dir(root.join("disk")).expect("a directory");
    std::os::unix::fs::symlink(root.join("disk"), root.join("link")).expect("a link");
    let said = |one: &str, other: &str| {
        let [one, other] = [one, other].map(|name| root.join(name).display().to_string());
        load_here(&format!(
            "[server]\ndisk = [{{ path = '{one}', bytes = '1GiB' }}, {{ path = '{other}', bytes = '1GiB' }}]\n\
             [[model]]\nname = 'a'\nsource = 'a'\n"
        ))
    };
    for (one, other) in
        [("disk", "link"), ("link", "disk"), ("link/new/a", "disk/new"), ("disk", "link/not/there")]
    {
        let text = said(one, other).expect_err("both are one");
        assert!(text.contains("by its links") && text.contains("a directory of its own"), "{text}");
        assert!(text.contains(&root.join("disk").display().to_string()), "{text}");
    }
    said("disk/a", "link/b").expect("two directories");
    said("disk/a", "disk/ab").expect("two directories whose names begin alike");
}

#[test]
fn a_list_where_a_table_belongs_and_no_model_at_all() {
    let said = load_here("[model]\nname = 'a'\nsource = 'a'").expect_err("one bracket");
    assert!(said.contains("write [[model]], with two brackets"), "{said}");
    assert!(load_here("").expect_err("empty").contains("no [[model]]"));
    assert!(load_here("model = [3]").expect_err("a number").contains("`model` must be a list of tables"));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let said = load_here("[server]\nlissten = 'x'\ndevice = 3\n[[model]]\nname = 'a'\n").expect_err("three");
    assert_eq!(said.lines().count(), 3, "{said}");
}

#[test]
fn auto_says_so_where_a_gpu_cannot_be_used() {
    let mut here = surroundings(Path::new("/nowhere"));
    here.nvidia = Some("/dev/nvidia0".into());
    let model = "[[model]]\nname = 'a'\nsource = 'a'\n";
    let said = load(model, &here).expect_err("never silently");
    assert!(said.contains("there is an NVIDIA device here (/dev/nvidia0)"), "{said}");
    assert!(said.contains("device = \"sim\""), "{said}");
    let config = load(&format!("[server]\ndevice = 'sim'\n{model}"), &here).expect("chosen");
    assert_eq!(config.device, DeviceChoice::Sim);
    here.gpus = Some(Gpus { listed: Err("nvidia-smi cannot be run (not found)".to_owned()), visible: None });
    for server in ["", "[server]\ndevice = 'cuda:1'\n"] {
        let said = load(&format!("{server}{model}"), &here).expect_err("never silently");
        assert!(said.contains("nvidia-smi cannot be run"), "{said}");
    }
    here.gpus = Some(Gpus { listed: Ok(vec![Gpu { driver: "460.32".to_owned(), ..gpu() }]), visible: None });
    let said = load(model, &here).expect_err("too old");
    assert!(said.contains("its driver is 460.32 and 470 is the least"), "{said}");
}

fn gpu() -> Gpu {
    Gpu {
        index: 0,
        uuid: "GPU-a".to_owned(),
        name: "NVIDIA H100".to_owned(),
        driver: "580.65.06".to_owned(),
        total: ByteCount::mib(81_559),
        free: ByteCount::mib(81_008),
    }
}

#[test]
fn a_gpu_is_taken_with_what_is_free_on_it_less_a_gibibyte() {
    let mut here = surroundings(Path::new("/nowhere"));
    here.nvidia = Some("/dev/nvidia0".into());
    here.gpus = Some(Gpus { listed: Ok(vec![gpu(), Gpu { index: 1, ..gpu() }]), visible: None });
    let model = "[[model]]\nname = 'a'\nsource = 'org/a'\n";
    let config = load(model, &here).expect("auto takes it");
    assert_eq!(config.device, DeviceChoice::Cuda(0));
    assert_eq!(config.device_budget, ByteCount::mib((81_008 - 1_024) / 64 * 64));
    assert_eq!(config.host_budget, ByteCount::gib(16));
    assert!(config.notes.is_empty(), "{:?}", config.notes);
    let server = "[server]\ndevice = 'cuda:1'\ndevice_budget = '200GiB'\n";
    let config = load(&format!("{server}{model}"), &here).expect("named");
    assert_eq!((config.device, config.device_budget), (DeviceChoice::Cuda(1), ByteCount::gib(200)));
    assert!(config.notes[0].contains("is free on NVIDIA H100 now"), "{:?}", config.notes);
    let said = load(&format!("[server]\ndevice = 'cuda:2'\n{model}"), &here).expect_err("there are two");
    assert!(said.contains("nvidia-smi lists 2 GPUs, counted from 0"), "{said}");
}

#[test]
fn the_headroom_stays_free_beside_the_budget() {
    let mut here = surroundings(Path::new("/nowhere"));
    let model = "[[model]]\nname = 'a'\nsource = 'org/a'\n";
    let of = |server: &str, here: &Surroundings| {
        let config = load(&format!("[server]\n{server}{model}"), here).expect("a good file");
        (config.device_budget, config.headroom, config.device_uuid)
    };
    assert_eq!(
        of("device_budget = '1GiB'\n", &here),
        (ByteCount::gib(1), ByteCount::ZERO, None),
        "none in RAM"
    );
    let said = of("device_budget = '1GiB'\nheadroom = '64MiB'\n", &here);
    assert_eq!(said, (ByteCount::gib(1), ByteCount::mib(64), None));
    here.nvidia = Some("/dev/nvidia0".into());
    here.gpus = Some(Gpus { listed: Ok(vec![gpu()]), visible: None });
    let uuid = || Some("GPU-a".to_owned());
    let whole = ByteCount::mib((81_008 - 1_024) / 64 * 64);
    assert_eq!(of("", &here), (whole, ByteCount::gib(1), uuid()));
    let more = ByteCount::mib((81_008 - 4_096) / 64 * 64);
    assert_eq!(
        of("headroom = '4GiB'\n", &here),
        (more, ByteCount::gib(4), uuid()),
        "it comes off what is free"
    );
    assert_eq!(of("device_budget = '70GiB'\n", &here), (ByteCount::gib(70), ByteCount::gib(1), uuid()));
    // Somebody who wants nearly all of it gets that.
    let most = of("device_budget = '81000MiB'\n", &here);
    assert_eq!(most, (ByteCount::mib(81_000), ByteCount((559 << 20) / 2), uuid()));
    // Numbers that nobody has are still numbers.
    let endless = of("device = 'sim'\ndevice_budget = '16777215TiB'\nheadroom = '16777215TiB'\n", &here);
    assert!(endless.0.checked_add(endless.1).is_some());
}

#[test]
fn loopback_needs_no_key_however_it_is_written() {
    for listen in ["127.0.0.1:0", "[::1]:8000", "127.3.2.1:1", "[::ffff:127.0.0.1]:8000"] {
        load_here(&format!("[server]\nlisten = '{listen}'\n[[model]]\nname = 'a'\nsource = 'a'\n"))
            .expect(listen);
    }
}

#[test]
fn sources_are_paths_or_ids() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir_all(dir.path().join("org/here")).expect("made");
    let file = dir.path().join("shoal.toml");
    let of = |source: &str| {
        std::fs::write(&file, format!("[[model]]\nname = 'a'\nsource = '{source}'\n")).expect("written");
        let config = ServerConfig::load(&file, &surroundings(dir.path())).expect("good");
        config.models[0].source.clone()
    };
    let below = |tail: &str| dir.path().join(tail).to_string_lossy().into_owned();
    assert_eq!(of("org/absent"), "org/absent");
    assert_eq!(of("org/here"), below("org/here"));
    assert_eq!(of("./org/absent"), below("org/absent"));
    assert_eq!(of("~/x"), below("home/x"));
    assert_eq!(of("/abs"), "/abs");
}

#[test]
fn the_file_is_found_in_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let here = surroundings(dir.path());
    let ConfigError::NotFound { looked_at } = find_file(None, &here).expect_err("nothing there") else {
        panic!("another error")
    };
    assert_eq!(looked_at, [dir.path().join("work/shoal.toml"), dir.path().join("config/shoal/shoal.toml")]);
    for file in looked_at.iter().rev() {
        std::fs::create_dir_all(file.parent().expect("has one")).expect("made");
        std::fs::write(file, "").expect("written");
        assert_eq!(&find_file(None, &here).expect("found"), file);
    }
    assert_eq!(find_file(Some(Path::new("x.toml")), &here).expect("named"), Path::new("x.toml"));
    let said = ServerConfig::load(&dir.path().join("gone.toml"), &here).expect_err("missing").to_string();
    assert!(said.contains("gone.toml: No such file"), "{said}");
}

#[test]
fn the_sample_is_good() {
    assert_eq!(load_here(SAMPLE).expect("good").models.len(), 2);
}

#[test]
fn no_text_makes_it_panic() {
    let whole = format!("{SAMPLE}\n[server.x]\ny = [{{a=1}}, '\u{e9}', 0x_1, 1979-05-27]\n");
    for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)) {
        let _ = parse(&whole[..end]);
        let _ = parse(&whole[end..]);
    }
}

#[test]
fn a_quantum_has_a_unit_and_sane_bounds() {
    let quantum = |value: &str| {
        load_here(&format!("[server]\nquantum = {value}\n[[model]]\nname = 'a'\nsource = 'b'\n"))
            .map(|config| config.quantum)
    };
    assert_eq!(quantum("'750ms'"), Ok(Duration::from_millis(750)));
    assert_eq!(quantum("2"), Ok(Duration::from_secs(2)));
    assert_eq!(quantum("'1m'"), Ok(Duration::from_mins(1)));
    for (wrong, why) in [
        ("0", "0ns does not lie between 50 ms and 1 h"),
        ("'2h'", "does not lie between 50 ms and 1 h"),
        ("'soon'", "write whole seconds, or a string such as \"500ms\""),
        ("-1", "write whole seconds"),
        ("true", "seconds, or a string such as"),
    ] {
        let said = quantum(wrong).expect_err(wrong);
        assert!(said.contains(why) && said.contains("shoal.toml:2"), "{wrong}: {said}");
    }
}

#[test]
fn memory_for_host_copies_is_lent_where_it_has_huge_pages_or_where_it_is_asked_for() {
    let of = |text: &str, shared_memory| {
        let text = format!("[server]\n{text}\n[[model]]\nname = \"a\"\nsource = \"b\"\n");
        let surroundings = Surroundings { shared_memory, ..surroundings(Path::new("/nowhere")) };
        load(&text, &surroundings).map(|config| config.host_memory)
    };
    let huge = Some(HostBacking::ReservedHugePages);
    assert_eq!(of("", None), Ok(None));
    assert_eq!(of("", huge), Ok(huge));
    assert_eq!(of("host_memory = \"private\"", huge), Ok(None));
    assert_eq!(of("host_memory = \"shared\"", None), Ok(Some(HostBacking::SharedHugePages)));
    let wrong = of("host_memory = \"huge\"", None).expect_err("no such choice");
    assert!(wrong.contains("\"private\""), "{wrong}");
}

#[test]
fn budgets_of_a_server_before_stay_where_its_workers_live() {
    let before = Budgets { device: ByteCount::mib(640), host: ByteCount::gib(3) };
    let resolved = |text: &str, budgets_before| {
        let surroundings = Surroundings { budgets_before, ..surroundings(Path::new("/nowhere")) };
        let file = parse(text).expect("a good file");
        file.resolve(Path::new("/x.toml"), &surroundings).expect("a good file")
    };
    let models = "[[model]]\nname = 'a'\nsource = 'x/a'\n";
    let config = resolved(models, Some(before));
    assert_eq!((config.device_budget, config.host_budget), (before.device, before.host));
    let config = resolved(&format!("[server]\ndevice_budget = '1GiB'\n{models}"), Some(before));
    assert_eq!((config.device_budget, config.host_budget), (ByteCount::gib(1), before.host));
    assert_ne!(resolved(models, None).host_budget, before.host);
    for (text, right) in [("0", 0), ("'2m'", 120), ("3600", 3_600)] {
        let config = resolved(&format!("[server]\norphan_s_max = {text}\n{models}"), None);
        assert_eq!(config.orphan_wait, Duration::from_secs(right));
    }
    let wrong = parse(&format!("[server]\norphan_s_max = '2h'\n{models}")).expect_err("too long");
    assert!(wrong[0].kind.to_string().contains("1 h at most"), "{wrong:?}");
}
