//! Workers that a server before left: which of them go on, and which have to end.
//!
//! Apart because it is the only place that touches processes which this server did not start. Each is known by its number
//! and its start, and held by a descriptor from then on ([`Survivor`]): nobody else's process is ever signalled.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::processes::SocketFile;
use super::tasks::KILLED_WAIT_MAX;
use crate::config::{Engine, ServerConfig};
use crate::supervisor::{Entry, Survivor};

/// A worker that lives.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) entry: Entry,
    pub(super) process: Survivor,
    /// The model it goes on serving, or why it cannot.
    pub(super) model: Result<usize, String>,
}

/// Those of the entries that live, each with what becomes of it.
pub(super) fn find(config: &ServerConfig, entries: Vec<Entry>, unix_ms: u64) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for entry in entries {
        let lived = Duration::from_millis(unix_ms.saturating_sub(entry.at_ms));
        let Some(process) = Survivor::find(entry.pid, entry.start, lived, entry.log.clone(), entry.log_from)
        else {
            tracing::info!(pid = entry.pid, model = entry.model, "a worker of the server before has ended");
            continue;
        };
        let is_taken = |place: usize| found.iter().any(|found| found.model == Ok(place));
        let model = match config.models.iter().position(|model| model.name == entry.model) {
            None => Err("its model is not in the configuration any more".to_owned()),
            Some(place) if config.models[place].engine == Engine::Command => {
                Err("its model is a command now".to_owned())
            }
            Some(place) if config.fingerprint(&config.models[place]) != entry.fingerprint => {
                Err("its model, or what serves it, was configured otherwise when it was started".to_owned())
            }
            Some(place) if is_taken(place) => Err("its model has another worker".to_owned()),
            Some(place) => Ok(place),
        };
        found.push(Found { entry, process, model });
    }
    found
}

/// Where the workers of each model listen: never where a worker of a server before does.
pub(super) fn sockets(config: &ServerConfig, found: &[Found]) -> Vec<PathBuf> {
    let taken: BTreeSet<&Path> = found.iter().map(|found| found.entry.socket.as_path()).collect();
    let all = (0..).map(|number| config.runtime_dir.join(format!("worker-{number}.sock")));
    all.filter(|path| !taken.contains(path.as_path())).take(config.models.len()).collect()
}

/// Removes the sockets that nobody listens at: what workers and commands left that ended without a server.
pub(super) fn tidy(config: &ServerConfig, found: &[Found]) {
    let Ok(entries) = std::fs::read_dir(&config.runtime_dir) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_ours = path.extension().is_some_and(|kind| kind == "sock")
            && (name.starts_with("worker-") || name.starts_with("command-"));
        if is_ours && found.iter().all(|found| found.entry.socket != path) {
            drop(SocketFile::new(path));
        }
    }
}

/// Ends one that cannot go on, and sees it gone.
pub(super) async fn end(shared: Arc<Shared>, found: Found, patience: Duration) {
    let Found { entry, mut process, .. } = found;
    let _socket = SocketFile::new(entry.socket);
    let ended = tokio::select! {
        () = shared.cancel.cancelled() => None,
        ended = process.end(patience) => Some(ended),
    };
    let ended = match ended {
        Some(ended) => ended,
        None => match tokio::time::timeout(KILLED_WAIT_MAX, process.end(Duration::ZERO)).await {
            Ok(ended) => ended,
            Err(_) => return,
        },
    };
    if let Err(error) = ended {
        tracing::error!(pid = entry.pid, %error, "a worker cannot be waited for; nothing is granted");
        return;
    }
    shared.journal.lock().ended(entry.pid);
    shared.with(|core, now_ms| core.handle_stranger_gone(entry.pid, now_ms));
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::config::{ModelConfig, parse};

    fn config(directory: &Path) -> ServerConfig {
        let text = "[server]\ndevice = 'sim'\ndevice_budget = '64MiB'\n[[model]]\nname = 'ash'\nsource = 'x/a'\n\
                    [[model]]\nname = 'elm'\nsource = 'x/b'\n";
        let surroundings = crate::config::Surroundings {
            runtime_dir: directory.to_owned(),
            ..crate::config::Surroundings::of_this_process()
        };
        parse(text)
            .and_then(|file| file.resolve(&directory.join("shoal.toml"), &surroundings))
            .expect("a good file")
    }

    fn entry(config: &ServerConfig, model: &ModelConfig, pid: u32, number: u32) -> Entry {
        Entry {
            model: model.name.clone(),
            pid,
            start: crate::supervisor::identity::started(pid).unwrap_or(1),
            socket: config.runtime_dir.join(format!("worker-{number}.sock")),
            fingerprint: config.fingerprint(model),
            log: PathBuf::from("/none"),
            log_from: 0,
            starts: 1,
            at_ms: 1,
        }
    }

    #[tokio::test]
    async fn each_is_sorted_by_what_it_is_and_what_is_wanted_now() {
        let scratch = tempfile::tempdir().expect("a directory");
        let config = config(scratch.path());
        let mut sleepers: Vec<_> =
            (0..5).map(|_| Command::new("sleep").arg("100").spawn().expect("a process")).collect();
        let [ash, elm] = &config.models[..] else { panic!("two models") };
        let of = |index: usize, model, number| entry(&config, model, sleepers[index].id(), number);
        let changed = ModelConfig { dtype: Some("float16".to_owned()), ..elm.clone() };
        let limits = ModelConfig { priority: 7, pin: true, keep_alive_s: Some(3), ..ash.clone() };
        let entries = vec![
            of(0, &limits, 4),
            of(1, &changed, 1),
            of(2, ash, 2),
            of(3, &ModelConfig::new("oak", "x/c"), 3),
            Entry { start: 1, ..of(4, elm, 5) },
            entry(&config, elm, u32::MAX, 6),
        ];
        for number in 0..7 {
            std::fs::write(scratch.path().join(format!("worker-{number}.sock")), "").expect("written");
        }
        std::fs::write(scratch.path().join("command-1.sock"), "").expect("written");
        std::fs::write(scratch.path().join("mine.sock"), "").expect("written");
        let found = find(&config, entries, 5_000);
        let sorted: Vec<(u32, Result<usize, &str>)> = found
            .iter()
            .map(|found| (found.entry.pid, found.model.as_ref().copied().map_err(String::as_str)))
            .collect();
        assert_eq!(sorted[0], (sleepers[0].id(), Ok(0)), "limits are the server's business");
        assert!(matches!(sorted[1].1, Err(why) if why.contains("configured otherwise")), "{sorted:?}");
        assert!(matches!(sorted[2].1, Err(why) if why.contains("another worker")), "{sorted:?}");
        assert!(matches!(sorted[3].1, Err(why) if why.contains("not in the configuration")), "{sorted:?}");
        assert_eq!(sorted.len(), 4, "numbers of others are not found");
        tidy(&config, &found);
        let mut left: Vec<String> = std::fs::read_dir(scratch.path())
            .expect("there")
            .map(|entry| entry.expect("there").file_name().to_string_lossy().into_owned())
            .collect();
        left.sort();
        assert_eq!(left, ["mine.sock", "worker-1.sock", "worker-2.sock", "worker-3.sock", "worker-4.sock"]);
        let names: Vec<PathBuf> =
            [0, 5].map(|number| scratch.path().join(format!("worker-{number}.sock"))).into();
        assert_eq!(sockets(&config, &found), names);
        assert!(sleepers[4].try_wait().expect("known").is_none(), "another's process was touched");
        drop(found);
        for sleeper in &mut sleepers {
            let _ = sleeper.kill();
            let _ = sleeper.wait();
        }
    }
}
