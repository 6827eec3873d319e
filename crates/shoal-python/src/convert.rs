//! Python's words for our values, and ours for Python's.
//!
//! Apart so that every function names sizes, seconds, kinds and reports the same way.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::Value;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::{DeviceInfo, DeviceKind};
use shoal_memory::{Backing, Conversion, Report, SourcePiece};

use crate::errors;

/// No wait is longer (I10); it also keeps deadlines within what a clock can hold.
const SECONDS_MAX: f64 = 30.0 * 24.0 * 3600.0;

/// `(freed, restored, copied, duration_s, error)`.
pub(crate) type ReportTuple = (u64, u64, u64, f64, Option<Py<PyAny>>);

/// `(path, offset, nbytes, conversion)`.
pub(crate) type SourceTuple = (PathBuf, u64, u64, Option<String>);

/// Reads a size such as `"640MiB"`.
#[pyfunction]
pub(crate) fn parse_bytes(size: &str) -> PyResult<u64> {
    ByteCount::from_str(size)
        .map(|bytes| bytes.0)
        .map_err(|error| PyValueError::new_err(format!("{size:?}: {error}")))
}

/// A wait in seconds.
pub(crate) fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    if value.is_nan() || value < 0.0 {
        return Err(PyValueError::new_err(format!("{name} must be 0 or more seconds, not {value}")));
    }
    Ok(Duration::from_secs_f64(value.min(SECONDS_MAX)))
}

/// A share between 0 and 1.
pub(crate) fn share(name: &str, value: f64) -> PyResult<f64> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(PyValueError::new_err(format!("{name} must be between 0 and 1, not {value}")))
    }
}

/// A device's name, as `device=` takes it.
pub(crate) fn device(info: &DeviceInfo) -> String {
    match info.kind {
        DeviceKind::Cuda => format!("cuda:{}", info.id.0),
        _ => format!("sim:{}", info.id.0),
    }
}

/// What a region is for.
pub(crate) fn lease_kind(kind: &str) -> PyResult<LeaseKind> {
    match kind {
        "weights" => Ok(LeaseKind::Weights),
        "kv" => Ok(LeaseKind::Kv),
        "workspace" => Ok(LeaseKind::Overhead),
        _ => Err(PyValueError::new_err(format!(
            "kind must be \"weights\", \"kv\" or \"workspace\", not {kind:?}"
        ))),
    }
}

/// What becomes of bytes that leave the device.
pub(crate) fn backing(backing: &str) -> PyResult<Backing> {
    match backing {
        "keep" => Ok(Backing::Keep),
        "discard" => Ok(Backing::Discard),
        _ => Err(PyValueError::new_err(format!("backing must be \"keep\" or \"discard\", not {backing:?}"))),
    }
}

/// Where staged bytes can be read again.
pub(crate) fn source_piece(source: SourceTuple) -> PyResult<SourcePiece> {
    let (path, offset, nbytes, conversion) = source;
    let conversion = match conversion.as_deref() {
        None => Conversion::None,
        Some("bf16_to_f32") => Conversion::Bf16ToF32,
        Some(other) => {
            return Err(PyValueError::new_err(format!(
                "conversion must be None or \"bf16_to_f32\", not {other:?}"
            )));
        }
    };
    Ok(SourcePiece { path: Arc::new(path), offset, bytes: ByteCount(nbytes), conversion })
}

/// What an eviction did, and what stood in its way.
pub(crate) fn evicted(py: Python<'_>, report: Report) -> ReportTuple {
    let error = report.error.map(|error| errors::of_memory(*error).into_value(py).into_any());
    (report.freed.0, 0, report.copied.0, report.duration.as_secs_f64(), error)
}

/// What a restore did.
pub(crate) fn restored(report: &Report) -> ReportTuple {
    (0, report.requested.0, report.copied.0, report.duration.as_secs_f64(), None)
}

/// JSON as Python's own objects.
pub(crate) fn json<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::Number(value) => match (value.as_u64(), value.as_i64()) {
            (Some(value), _) => value.into_pyobject(py)?.into_any(),
            (None, Some(value)) => value.into_pyobject(py)?.into_any(),
            (None, None) => value.as_f64().into_pyobject(py)?.into_any(),
        },
        Value::String(value) => value.into_pyobject(py)?.into_any(),
        Value::Array(values) => {
            let list = PyList::empty(py);
            for value in values {
                list.append(json(py, value)?)?;
            }
            list.into_any()
        }
        Value::Object(entries) => {
            let dict = PyDict::new(py);
            for (key, value) in entries {
                dict.set_item(key, json(py, value)?)?;
            }
            dict.into_any()
        }
    })
}

/// Anything that can be serialised, as Python's own objects.
pub(crate) fn plain<'py>(py: Python<'py>, value: &impl serde::Serialize) -> PyResult<Bound<'py, PyAny>> {
    let value = serde_json::to_value(value).map_err(|error| PyValueError::new_err(error.to_string()))?;
    json(py, &value)
}

/// What can be JSON as Python's plain objects, by Python's own decoder.
pub(crate) fn to_plain<'py, T: serde::Serialize>(py: Python<'py>, value: &T) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| PyValueError::new_err(error.to_string()))?;
    py.import("json")?.call_method1("loads", (text,))
}

/// Python's plain objects as JSON, by Python's own encoder.
pub(crate) fn from_plain<T: serde::de::DeserializeOwned>(
    what: &str,
    object: &Bound<'_, PyAny>,
) -> PyResult<T> {
    let text: String = object.py().import("json")?.call_method1("dumps", (object,))?.extract()?;
    serde_json::from_str(&text).map_err(|error| PyValueError::new_err(format!("{what}: {error}")))
}
