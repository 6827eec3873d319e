//! `shoal serve`: from a file to a running server, and back to nothing.
//!
//! The order matters: everything that can be wrong is found before the first worker starts (the file, the keys, the
//! address), and `server.json` appears only when there is somebody to answer. On the way down the listener closes first,
//! answers under way may finish, and the workers go last.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::client::ServerFile;
use super::{Failure, Out};
use crate::config::{ConfigError, DeviceChoice, SAMPLE, ServerConfig, Surroundings, find_file, make_private};
use crate::gateway::{App, Keys, Models, Settings, bind, serve as answer};
use crate::shelf::Shelf;

/// How long answers under way may take after the first Ctrl-C.
const LINGER_MAX: Duration = Duration::from_secs(20);
/// How long workers may take to end, after that.
const SHUTDOWN_MAX: Duration = Duration::from_secs(10);
/// The same after the second Ctrl-C.
const SHUTDOWN_FAST_MAX: Duration = Duration::from_secs(2);

pub(super) fn serve(file: Option<&Path>, check: bool, out: Out<'_>, errors: Out<'_>) -> Result<(), Failure> {
    let surroundings = Surroundings::of_this_process();
    let config = load(file, &surroundings, errors)?;
    let keys = config.api_key_file.as_deref().map(Keys::read).transpose();
    let keys = keys.map_err(|error| Failure { code: 2, message: error.to_string() })?;
    if check {
        write!(out, "{}", banner(&config, keys.as_ref(), None))?;
        if !config.unservable.is_empty() {
            return Err(Failure { code: 2, message: config.unservable.join("\n") });
        }
        return Ok(());
    }
    super::log::set_up()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("shoal").build()?;
    let done = runtime.block_on(run(config, keys, out, errors));
    runtime.shutdown_timeout(SHUTDOWN_FAST_MAX);
    done
}

fn load(file: Option<&Path>, surroundings: &Surroundings, errors: Out<'_>) -> Result<ServerConfig, Failure> {
    let found = find_file(file, surroundings).and_then(|file| ServerConfig::load(&file, surroundings));
    found.map_err(|error| told_of(&error, errors))
}

/// What is said where there is no configuration that can be used.
pub(super) fn told_of(error: &ConfigError, errors: Out<'_>) -> Failure {
    if matches!(error, ConfigError::NotFound { .. }) {
        let _ = writeln!(errors, "shoal: {error}.\nA file to begin with:\n\n{SAMPLE}");
        return Failure { code: 2, message: String::new() };
    }
    Failure { code: 2, message: error.to_string() }
}

/// Ctrl-C and a service manager's way of saying the same.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

async fn run(config: ServerConfig, keys: Option<Keys>, out: Out<'_>, errors: Out<'_>) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let mut hangups = signal(SignalKind::hangup())?;
    let listener = bind(config.listen).await.map_err(Failure::new)?;
    let address = listener.local_addr()?;
    let config = Arc::new(config);
    for dir in [&config.runtime_dir, &config.state_dir, &config.log_dir] {
        make_private(dir)?;
    }
    let models = start_shelf(&config)?;
    let text = banner(&config, keys.as_ref(), Some(&url_of(address)));
    let app = App::new(Arc::clone(&models), &config, keys, Settings::default());
    let here = ServerFile {
        pid: std::process::id(),
        address: address.to_string(),
        url: url_of(address),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let written = here.write(&config.server_json());
    let shown = written.and_then(|()| write!(out, "{text}")).and_then(|()| out.flush());

    let (stop, fast) = (CancellationToken::new(), CancellationToken::new());
    let mut answering = tokio::spawn({
        let (stop, fast) = (stop.clone(), fast.clone());
        async move {
            tokio::select! {
                result = answer(listener, &app, stop, LINGER_MAX) => result,
                () = fast.cancelled() => Ok(()),
            }
        }
    });
    let mut ended = None;
    while shown.is_ok() {
        tokio::select! {
            () = signals.next() => break,
            // Its outcome is an event, and in the log.
            _ = hangups.recv() => drop(models.reload().await),
            result = &mut answering => {
                ended = Some(result);
                break;
            }
        }
    }
    stop.cancel();
    let active: u64 = models.snapshot().models.iter().map(|model| model.counts.requests_active).sum();
    let _ = writeln!(errors, "shoal: stopping; {active} requests under way (Ctrl-C again to stop at once)");
    let down = async {
        if ended.is_none() {
            ended = Some((&mut answering).await);
        }
        models.shutdown(Instant::now() + SHUTDOWN_MAX).await;
    };
    let in_time = tokio::select! {
        () = down => true,
        () = signals.next() => false,
    };
    if !in_time {
        fast.cancel();
        models.shutdown(Instant::now() + SHUTDOWN_FAST_MAX).await;
    }
    let _ = std::fs::remove_file(config.server_json());
    shown?;
    match ended {
        Some(Ok(Err(error))) => Err(error.into()),
        Some(Err(error)) => Err(Failure::new(error.to_string())),
        _ => Ok(()),
    }
}

fn start_shelf(config: &Arc<ServerConfig>) -> Result<Arc<dyn Models>, Failure> {
    let shelf = Shelf::start(Arc::clone(config)).map_err(|error| Failure::new(whole_story(&error)))?;
    Ok(Arc::new(shelf))
}

/// An error with its causes, as one sentence.
fn whole_story(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            let _ = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text
}

/// How a browser on this machine reaches the address.
fn url_of(mut address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    format!("http://{address}")
}

fn banner(config: &ServerConfig, keys: Option<&Keys>, url: Option<&str>) -> String {
    let mut text = format!("Shoal {}\n", env!("CARGO_PKG_VERSION"));
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<9}{value}");
    };
    if let Some(url) = url {
        line("page", &format!("{url}/"));
        line("clients", &format!("{url}/v1"));
    } else {
        line("listen", &config.listen.to_string());
    }
    line("device", &format!("{}, {} for all models together", config.device, config.device_budget));
    if config.device == DeviceChoice::Sim {
        line("", "No GPU: the device is simulated in RAM. That shows the logic, saves no memory,");
        line("", "and its times say nothing about a GPU.");
    }
    let of_it = config.host_tiers().into_iter().map(|(_, bytes)| bytes).sum::<shoal_core::bytes::ByteCount>();
    let for_kv = if of_it.is_zero() { String::new() } else { format!(", up to {of_it} of it for KV") };
    line("host", &format!("{} for copies{for_kv}", config.host_budget));
    for model in &config.models {
        line("model", &format!("{} = {} ({})", model.name, model.source, model.engine.name()));
    }
    line("logs", &config.log_dir.display().to_string());
    if let Some(keys) = keys {
        line("keys", &format!("{keys:?} ({}); clients must show one", keys.names().join(", ")));
        if keys.readable_by_others {
            line("note", "other users of this machine can read api_key_file; chmod 600 it");
        }
    }
    // A server starts nevertheless: the other models can be served.
    for note in config.notes.iter().chain(&config.unservable) {
        line("note", note);
    }
    if url.is_some() {
        line("", "Ctrl-C stops it.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_links() {
        for (address, url) in [
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::]:8000", "http://[::1]:8000"),
        ] {
            assert_eq!(url_of(address.parse().expect("an address")), url);
        }
    }
}
