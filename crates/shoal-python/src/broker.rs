//! `BrokerClient`: a worker's line to the server.
//!
//! Reading, leases and orders run on threads of `shoal-memory` that never need the GIL; here is only what an engine
//! says, and the order to end that it waits for.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustix::process::{Signal, getpid, kill_process};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::WorkerCapabilities;
use shoal_memory::{BrokerClient, Welcome};

use crate::convert;
use crate::errors;
use crate::owner::Owned;

/// How long a wait goes without looking for an interrupt.
const SLICE: Duration = Duration::from_millis(200);

/// How long a process that was asked to end may take.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// What happens when the socket closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDisconnect {
    Exit,
    End,
    Ignore,
}

/// A worker's line to the server.
#[pyclass(frozen, name = "BrokerClient", module = "shoal._native")]
pub(crate) struct PyBrokerClient {
    client: Owned<Arc<BrokerClient>>,
    path: PathBuf,
    welcome: Welcome,
    on_disconnect: Mutex<OnDisconnect>,
}

impl PyBrokerClient {
    pub(crate) fn client(&self) -> PyResult<&Arc<BrokerClient>> {
        self.client.get()
    }
}

#[pymethods]
impl PyBrokerClient {
    #[staticmethod]
    #[pyo3(signature = (path, model, timeout_s = 10.0, pid = None))]
    fn connect(
        py: Python<'_>,
        path: PathBuf,
        model: &str,
        timeout_s: f64,
        pid: Option<u32>,
    ) -> PyResult<Self> {
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let pid = pid.unwrap_or_else(std::process::id);
        let (client, welcome) =
            py.detach(|| BrokerClient::connect(&path, model, pid, timeout)).map_err(errors::of_memory)?;
        Ok(Self {
            client: Owned::new(client),
            path,
            welcome,
            on_disconnect: Mutex::new(OnDisconnect::Ignore),
        })
    }

    #[getter]
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    #[getter]
    fn welcome<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        dict.set_item("spec", convert::json(py, &self.welcome.spec)?)?;
        dict.set_item("device", &self.welcome.device)?;
        dict.set_item("device_bytes", self.welcome.device_bytes.0)?;
        dict.set_item("host_budget", self.welcome.host_budget.0)?;
        dict.set_item("data_socket", &self.welcome.data_socket)?;
        Ok(dict)
    }

    #[getter]
    fn on_disconnect(&self) -> &'static str {
        match *self.on_disconnect.lock() {
            OnDisconnect::Exit => "exit",
            OnDisconnect::End => "end",
            OnDisconnect::Ignore => "ignore",
        }
    }

    #[setter]
    fn set_on_disconnect(&self, py: Python<'_>, value: &str) -> PyResult<()> {
        let client = self.client.get()?;
        let wanted = match value {
            "exit" => OnDisconnect::Exit,
            "end" => OnDisconnect::End,
            "ignore" => OnDisconnect::Ignore,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "on_disconnect must be \"exit\", \"end\" or \"ignore\", not {value:?}"
                )));
            }
        };
        *self.on_disconnect.lock() = wanted;
        py.detach(|| match wanted {
            OnDisconnect::Exit => client.on_disconnect(end_process),
            OnDisconnect::End => client.on_disconnect(ask_to_end),
            OnDisconnect::Ignore => client.on_disconnect(|_| {}),
        });
        Ok(())
    }

    #[getter]
    fn connected(&self) -> PyResult<bool> {
        Ok(self.client.get()?.closed().is_none())
    }

    /// How long another server is waited for when this one is gone.
    #[getter]
    fn server_wait_s(&self) -> f64 {
        self.welcome.server_wait.as_secs_f64()
    }

    fn loading(&self, py: Python<'_>, phase: &str, done: u64, total: u64) -> PyResult<()> {
        let client = self.client.get()?;
        py.detach(|| client.loading(phase, ByteCount(done), ByteCount(total)));
        Ok(())
    }

    fn ready(&self, py: Python<'_>, capabilities: &Bound<'_, PyDict>) -> PyResult<()> {
        let client = self.client.get()?;
        let capabilities: WorkerCapabilities = convert::from_plain("capabilities", capabilities)?;
        py.detach(|| client.ready(capabilities));
        Ok(())
    }

    fn failed(&self, py: Python<'_>, code: &str, message: &str) -> PyResult<()> {
        let client = self.client.get()?;
        py.detach(|| client.failed(code, message));
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "Python's face names them")]
    #[pyo3(signature = (*, requests_running, requests_waiting, tokens_out, tokens_embedded = 0, kv_back_us_per_mib = 0, kv_found_milli = 0, overhead = None, tiers = None, weights_at_rest = None))]
    fn usage(
        &self,
        requests_running: u32,
        requests_waiting: u32,
        tokens_out: u64,
        tokens_embedded: u64,
        kv_back_us_per_mib: u64,
        kv_found_milli: u64,
        overhead: Option<(u64, u64)>,
        tiers: Option<&Bound<'_, PyAny>>,
        weights_at_rest: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let client = self.client.get()?;
        client.set_kv_back(kv_back_us_per_mib, kv_found_milli);
        if let Some((measured, peak)) = overhead {
            client.set_overhead(ByteCount(measured), ByteCount(peak));
        }
        if let Some(tiers) = tiers {
            client.set_tiers(convert::from_plain("tiers", tiers)?);
        }
        if let Some(at_rest) = weights_at_rest {
            client.set_weights_at_rest(convert::from_plain("weights_at_rest", at_rest)?);
        }
        // Last: where no request is left, all figures are said now.
        client.set_requests(requests_running, requests_waiting, tokens_out, tokens_embedded);
        Ok(())
    }

    /// The engine's steps run beside wakes.
    fn set_steps_in_order(&self) -> PyResult<()> {
        self.client.get()?.set_steps_in_order();
        Ok(())
    }

    #[getter]
    fn shutdown_requested(&self) -> PyResult<bool> {
        Ok(self.client.get()?.shutdown_order().is_some())
    }

    /// Waits in slices, so that an interrupt is seen.
    #[pyo3(signature = (timeout_s = None))]
    fn wait_shutdown<'py>(
        &self,
        py: Python<'py>,
        timeout_s: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let client = self.client.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s.unwrap_or(f64::INFINITY))?;
        let begun = Instant::now();
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            if let Some(order) = py.detach(|| client.wait_shutdown(left.min(SLICE))) {
                let deadline = order.deadline.saturating_duration_since(Instant::now());
                let dict = PyDict::new(py);
                dict.set_item("deadline_ms", u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX))?;
                dict.set_item("reason", order.reason)?;
                return Ok(Some(dict));
            }
            if left <= SLICE || client.closed().is_some() {
                return Ok(None);
            }
            py.check_signals()?;
        }
    }
}

/// Asks this process to end in order (SIGTERM), and ends it if it has not by the end of [`END_PATIENCE`].
fn ask_to_end(reason: &str) {
    let _ = writeln!(std::io::stderr(), "shoal: the server is gone ({reason}); this worker is to end");
    if kill_process(getpid(), Signal::TERM).is_err() {
        end_process(reason);
    }
    let reason = reason.to_owned();
    let patience = std::thread::Builder::new().name("shoal-end".to_owned());
    let waits = patience.spawn(move || {
        std::thread::sleep(END_PATIENCE);
        end_process(&reason);
    });
    // Without the thread it may live on; it was asked.
    let _ = waits;
}

/// Ends this process at once: its server is gone, so nothing may hold memory any longer. By signal, because neither
/// handlers nor destructors may keep it alive, and the kernel gives back whatever it held.
fn end_process(reason: &str) {
    let _ = writeln!(std::io::stderr(), "shoal: the server is gone ({reason}); this worker ends");
    if kill_process(getpid(), Signal::KILL).is_err() {
        std::process::abort();
    }
}
