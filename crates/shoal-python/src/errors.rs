//! The one place where an error of ours becomes a Python exception.
//!
//! The classes are Python's (`shoal.errors`), so that they can be documented, pickled and subclassed there. A kind that is
//! not known here becomes the base class: something catchable, with its sentence, always.

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::limit::LimitError;
use shoal_core::kv::state::KvError;
use shoal_core::protocol::LeaseKind;
use shoal_device::{DeviceError, ErrorKind};
use shoal_memory::disk::DiskError;
use shoal_memory::weights::WeightsError;
use shoal_memory::{LeaseError, MemoryError};

/// The value of a field of an error.
#[derive(Debug)]
pub(crate) enum Field {
    Bytes(ByteCount),
    Count(u64),
    Seconds(f64),
    Text(String),
}

impl From<ByteCount> for Field {
    fn from(bytes: ByteCount) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<u64> for Field {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<std::time::Duration> for Field {
    fn from(duration: std::time::Duration) -> Self {
        Self::Seconds(duration.as_secs_f64())
    }
}

impl From<String> for Field {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Field {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// Makes an exception of class `shoal.errors.CLASS`. Takes the GIL: for use after `Python::detach`, never inside.
pub(crate) fn raise(class: &str, kind: &str, message: &str, fields: Vec<(&str, Field)>) -> PyErr {
    Python::attach(|py| build(py, class, kind, message, fields).unwrap_or_else(|error| error))
}

fn build(
    py: Python<'_>,
    class: &str,
    kind: &str,
    message: &str,
    fields: Vec<(&str, Field)>,
) -> PyResult<PyErr> {
    let given = PyDict::new(py);
    given.set_item("kind", kind)?;
    for (name, field) in fields {
        let value = match field {
            Field::Bytes(bytes) => bytes.0.into_bound_py_any(py)?,
            Field::Count(count) => count.into_bound_py_any(py)?,
            Field::Seconds(seconds) => seconds.into_bound_py_any(py)?,
            Field::Text(text) => text.into_bound_py_any(py)?,
        };
        given.set_item(name, value)?;
    }
    let class = py.import("shoal.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((message,), Some(&given))?))
}

/// A handle of process `owner` was used in process `pid`.
pub(crate) fn forked(owner: u32, pid: u32) -> PyErr {
    raise(
        "ForkError",
        "forked",
        &format!(
            "made in process {owner} and used in process {pid}: a device does not survive a fork; make the handle after \
             forking, or start processes with \"spawn\""
        ),
        vec![("owner", u64::from(owner).into()), ("pid", u64::from(pid).into())],
    )
}

/// Why a disk tier was not opened.
///
/// By value, so that it stands alone in `map_err`.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(crate) fn of_disk(error: DiskError) -> PyErr {
    let (kind, path) = match &error {
        DiskError::InUse { path, .. } => ("in_use", path),
        DiskError::NotPrivate { path, .. } => ("not_private", path),
        DiskError::OtherVersion { path, .. } => ("other_version", path),
        DiskError::Foreign { path, .. } => ("foreign", path),
        DiskError::Damaged { path, .. } => ("damaged", path),
        DiskError::Options { path, .. } => ("options", path),
        DiskError::TooSmall { path, .. } => ("too_small", path),
        DiskError::Encrypted { path } => ("encrypted", path),
        DiskError::NotEncrypted { path } => ("not_encrypted", path),
        DiskError::OtherKey { path } => ("other_key", path),
        DiskError::KeyFile { path, .. } => ("key_file", path),
        DiskError::Io { path, .. } => ("io", path),
        _ => return raise("TierError", "other", &error.to_string(), vec![]),
    };
    let path = path.display().to_string();
    raise("TierError", kind, &error.to_string(), vec![("path", path.into())])
}

/// Why weights were not stored, or not read.
pub(crate) fn of_weights(error: WeightsError) -> PyErr {
    let text = error.to_string();
    let kind = match error {
        WeightsError::Disk(error) => return of_disk(error),
        WeightsError::Memory(error) => return of_memory(error),
        WeightsError::NoRoom { .. } => "no_room",
        WeightsError::TooSoon { wait, .. } => {
            return raise("TierError", "too_soon", &text, vec![("wait_s", wait.into())]);
        }
        WeightsError::Damaged { .. } => "damaged",
        WeightsError::OtherLayout => "other_layout",
        WeightsError::Changed { .. } => "changed",
        WeightsError::BadName { .. } => "bad_name",
        WeightsError::Stopped => "stopped",
        _ => "failed",
    };
    raise("TierError", kind, &text, vec![])
}

/// What the memory manager said.
///
/// By value, so that it stands alone in `map_err`.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(crate) fn of_memory(error: MemoryError) -> PyErr {
    let message = error.to_string();
    match &error {
        MemoryError::Device { source, .. } => of_device_saying(source, &message),
        MemoryError::Lease { source, .. } => of_lease(source, &message),
        MemoryError::HostBudget { needed, free, budget } => raise(
            "OutOfMemoryError",
            "host_budget",
            &message,
            vec![
                ("tier", "host".into()),
                ("requested", (*needed).into()),
                ("free", (*free).into()),
                ("capacity", (*budget).into()),
            ],
        ),
        MemoryError::OutOfRange { region, .. } => {
            raise("RegionError", "out_of_range", &message, vec![("region", region.as_str().into())])
        }
        MemoryError::State { region, .. } => {
            raise("RegionError", "state", &message, vec![("region", region.as_str().into())])
        }
        MemoryError::NestedGuard { region, missing } => raise(
            "RegionError",
            "nested",
            &message,
            vec![("region", region.as_str().into()), ("missing", missing.0.into())],
        ),
        MemoryError::Table { region, .. } => {
            raise("RegionError", "table", &message, vec![("region", region.as_str().into())])
        }
        MemoryError::SourceRead { path, .. } => {
            raise("TransferError", "source_read", &message, vec![("path", path.display().to_string().into())])
        }
        MemoryError::SourceMismatch { path, .. } => raise(
            "TransferError",
            "source_mismatch",
            &message,
            vec![("path", path.display().to_string().into())],
        ),
        MemoryError::Deadline { waited, .. } => {
            raise("DeadlineError", "deadline", &message, vec![("waited_s", (*waited).into())])
        }
        MemoryError::StillMapped { waited, .. } => {
            raise("DeadlineError", "still_mapped", &message, vec![("waited_s", (*waited).into())])
        }
        MemoryError::Cancelled { .. } => raise("TransferError", "cancelled", &message, vec![]),
        MemoryError::TooManyTransfers { .. } => {
            raise("TransferError", "too_many_transfers", &message, vec![])
        }
        MemoryError::Blocks(_) => raise("RegionError", "blocks", &message, vec![]),
        MemoryError::KvLayout(_) | MemoryError::Kv(KvError::MixedTokens { .. }) => {
            PyValueError::new_err(message)
        }
        MemoryError::Kv(source) => raise("RegionError", kv_kind(source), &message, vec![]),
        MemoryError::Broker { path, .. } => {
            raise("BrokerError", "broker", &message, vec![("path", path.display().to_string().into())])
        }
        _ => raise("Error", "unknown", &message, vec![]),
    }
}

/// What a KV cache refused.
const fn kv_kind(error: &KvError) -> &'static str {
    match error {
        KvError::Blocks(_) => "blocks",
        KvError::UnknownGroup { .. } => "group",
        KvError::Limit(LimitError::Stale { .. }) => "stale",
        KvError::Limit(LimitError::Conflict { .. }) => "conflict",
        KvError::Limit(_) => "limit",
        KvError::Prefix(_) | KvError::NoReuse => "prefix",
        KvError::NoDebug => "debug",
        _ => "unknown",
    }
}

fn of_lease(error: &LeaseError, message: &str) -> PyErr {
    match error {
        LeaseError::Denied { kind, requested, reason } => raise(
            "LeaseError",
            "denied",
            message,
            vec![
                ("lease", kind_name(*kind).into()),
                ("requested", (*requested).into()),
                ("reason", reason.as_str().into()),
            ],
        ),
        LeaseError::Deadline { waited, .. } => {
            raise("DeadlineError", "lease_deadline", message, vec![("waited_s", (*waited).into())])
        }
        LeaseError::Disconnected { .. } => raise("BrokerError", "disconnected", message, vec![]),
        _ => raise("LeaseError", "unknown", message, vec![]),
    }
}

/// How a kind of lease is called in Python.
pub(crate) const fn kind_name(kind: LeaseKind) -> &'static str {
    match kind {
        LeaseKind::Weights => "weights",
        LeaseKind::Kv => "kv",
        LeaseKind::Overhead => "overhead",
    }
}

/// What the device said.
pub(crate) fn of_device(error: &DeviceError) -> PyErr {
    of_device_saying(error, &error.to_string())
}

fn of_device_saying(error: &DeviceError, message: &str) -> PyErr {
    match error {
        DeviceError::OutOfMemory { requested, free, capacity, .. } => raise(
            "OutOfMemoryError",
            "out_of_memory",
            message,
            vec![
                ("tier", "device".into()),
                ("requested", (*requested).into()),
                ("free", (*free).into()),
                ("capacity", (*capacity).into()),
            ],
        ),
        DeviceError::HostMemory { requested, available, .. } => raise(
            "OutOfMemoryError",
            "host_memory",
            message,
            vec![("tier", "host".into()), ("requested", (*requested).into()), ("free", (*available).into())],
        ),
        DeviceError::Timeout { waited, .. } | DeviceError::QueueFull { waited, .. } => {
            raise("DeadlineError", "timeout", message, vec![("waited_s", (*waited).into())])
        }
        DeviceError::Forked { opened_by, process, .. } => raise(
            "ForkError",
            "forked",
            message,
            vec![("owner", u64::from(*opened_by).into()), ("pid", u64::from(*process).into())],
        ),
        other => raise("DeviceError", device_kind(other.kind()), message, device_fields(other)),
    }
}

fn device_kind(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::OutOfMemory => "out_of_memory",
        ErrorKind::Exhausted => "exhausted",
        ErrorKind::Usage => "usage",
        ErrorKind::Busy => "busy",
        ErrorKind::Timeout => "timeout",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::System => "system",
        ErrorKind::Injected => "injected",
        _ => "unknown",
    }
}

fn device_fields(error: &DeviceError) -> Vec<(&'static str, Field)> {
    match error {
        DeviceError::System { call, .. } | DeviceError::Driver { call, .. } => vec![("call", (*call).into())],
        DeviceError::Injected { verb, .. } => vec![("call", verb.to_string().into())],
        DeviceError::CapacityMismatch { device, .. } | DeviceError::Unsupported { device, .. } => {
            vec![("device", device.to_string().into())]
        }
        DeviceError::Unavailable { device, .. } => vec![("device", format!("cuda:{}", device.0).into())],
        _ => Vec::new(),
    }
}
