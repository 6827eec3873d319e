//! Asks the device's driver every second what is taken of it.
//!
//! Apart because a driver may hang: it is asked on a thread of its own, which nothing waits for beyond a deadline and which
//! nobody joins. Where it hangs, the server says so and goes on by its ledger; when it answers after all, that counts again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use shoal_core::drift::Reading;
use shoal_device::gauge::{Gauge, GaugeError, NvmlGauge, SimGauge};
use tokio::sync::mpsc;

use super::Shared;
use crate::broker::{Core, Looked};
use crate::config::{DeviceChoice, ServerConfig};
use crate::supervisor::group_of;

/// How often the driver is asked.
const EVERY: Duration = Duration::from_secs(1);
/// How soon again, where a reading shows what several must agree on.
const SOON: Duration = Duration::from_millis(250);
/// How long an answer may take before the driver counts as silent.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// What a gauge is opened by, on the thread that reads it: opening may hang as well, and may succeed later.
pub(super) type Opener = Box<dyn FnMut() -> Result<Box<dyn Gauge>, GaugeError> + Send>;

/// The gauge of the configured device.
pub(super) fn opener(config: &ServerConfig) -> Option<Opener> {
    match (config.device, &config.device_uuid) {
        (DeviceChoice::Sim, _) => {
            let capacity = config.device_budget + config.headroom;
            let gauge = SimGauge::new(&config.runtime_dir, 0, capacity);
            Some(Box::new(move || Ok(Box::new(gauge.clone()) as Box<dyn Gauge>)))
        }
        (DeviceChoice::Cuda(_), Some(uuid)) => {
            let uuid = uuid.clone();
            Some(Box::new(move || Ok(Box::new(NvmlGauge::open(&uuid)?) as Box<dyn Gauge>)))
        }
        (DeviceChoice::Cuda(_) | DeviceChoice::Auto, _) => None,
    }
}

type Answer = Result<(Looked, String), String>;

/// Asks until the server ends.
pub(super) async fn keep(shared: Arc<Shared>, opener: Opener) {
    let (questions, mut answers) = match start(opener) {
        Ok(ends) => ends,
        Err(error) => {
            let reason = format!("no thread to read it on: {error}");
            return shared.with(|core, now_ms| core.handle_driver_lost(reason, now_ms));
        }
    };
    let soon = shared.with(|core, _| Arc::clone(&core.look_soon));
    let mut wait = Duration::ZERO;
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
            () = soon.notified() => {}
        }
        let begun_ms = shared.with(Core::begin_look);
        // Nobody else asks, and the answer to the question before was waited for.
        if questions.try_send(begun_ms).is_err() {
            let reason = "the thread that reads it has ended".to_owned();
            return shared.with(|core, now_ms| core.handle_driver_lost(reason, now_ms));
        }
        let mut is_silent = false;
        let answer = loop {
            tokio::select! {
                () = shared.cancel.cancelled() => return,
                answer = answers.recv() => break answer,
                () = tokio::time::sleep(ANSWER_MAX), if !is_silent => {
                    is_silent = true;
                    let reason = format!("the driver has not answered for {} s", ANSWER_MAX.as_secs());
                    shared.with(|core, now_ms| core.handle_driver_lost(reason, now_ms));
                }
            }
        };
        wait = EVERY;
        match answer {
            Some(Ok((looked, source))) => {
                let again = shared.with(|core, now_ms| {
                    core.driver.source = source;
                    core.handle_looked(looked, now_ms)
                });
                if again {
                    wait = SOON;
                }
            }
            Some(Err(reason)) => shared.with(|core, now_ms| core.handle_driver_lost(reason, now_ms)),
            None => {
                let reason = "the thread that reads it has ended".to_owned();
                return shared.with(|core, now_ms| core.handle_driver_lost(reason, now_ms));
            }
        }
    }
}

/// Starts the thread. It ends when nobody asks any more, or with the process, where the driver hangs.
fn start(mut opener: Opener) -> std::io::Result<(SyncSender<u64>, mpsc::Receiver<Answer>)> {
    let (questions, asked) = sync_channel::<u64>(1);
    let (answer, answers) = mpsc::channel(1);
    let work = move || {
        let mut gauge: Option<Box<dyn Gauge>> = None;
        while let Ok(begun_ms) = asked.recv() {
            let began = Instant::now();
            let read = look(&mut gauge, &mut opener).map(|(reading, source)| {
                let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                let (groups, names) = processes(&reading, Path::new("/proc"));
                (Looked { reading, groups, names, begun_ms, took_us }, source)
            });
            if answer.blocking_send(read.map_err(|error| error.to_string())).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("shoal-driver".to_owned()).spawn(work)?;
    Ok((questions, answers))
}

fn look(gauge: &mut Option<Box<dyn Gauge>>, opener: &mut Opener) -> Result<(Reading, String), GaugeError> {
    let open = match gauge {
        Some(open) => open,
        None => gauge.insert(opener()?),
    };
    match open.read() {
        Ok(reading) => Ok((reading, open.source())),
        Err(error) => {
            // A driver that was loaded anew needs to be opened anew.
            *gauge = None;
            Err(error)
        }
    }
}

/// The groups and names of the processes in a reading, as far as they can be seen from here.
fn processes(reading: &Reading, proc: &Path) -> (BTreeMap<u32, u32>, BTreeMap<u32, String>) {
    let shown = reading.processes.iter().map(|shown| shown.process);
    let groups = shown.clone().filter_map(|pid| Some((pid, group_of(pid)?))).collect();
    let name = |pid: u32| {
        let name = std::fs::read_to_string(proc.join(pid.to_string()).join("comm")).ok()?;
        Some((pid, name.trim().to_owned()))
    };
    (groups, shown.filter_map(name).collect())
}
