//! What a look at the models' directories tells before any worker starts: that one is not there, that one cannot fit.
//!
//! Only file headers are read. Whatever cannot be read here is left to the worker, which says exactly what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use shoal_core::bytes::ByteCount;

use super::{DeviceChoice, Engine, ModelConfig};

/// The longest header that is read, as in the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;
const FLOATS: [&str; 4] = ["F64", "F32", "F16", "BF16"];
/// What `shoal.demo` can make.
const DEMO_MODELS: [&str; 3] = ["chat", "documents", "code"];

/// Where a model of the demo lies, of the newest recipe there is; none where it is not prepared.
fn prepared_demo(name: &str, cache: &Path) -> Option<PathBuf> {
    let recipe = |path: &PathBuf| {
        path.file_name()?.to_str()?.strip_prefix(name)?.strip_prefix('-')?.parse::<u32>().ok()
    };
    let entries = std::fs::read_dir(cache.join("models/demo")).ok()?;
    let found = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| recipe(path).is_some());
    found.filter(|path| path.join("shoal-demo.json").is_file()).max_by_key(recipe)
}

/// Why `model` cannot be served by a device with this budget (in bytes), as far as its directory shows; none where it can
/// be, or where nothing is known (a hub id, a directory whose files cannot be read).
pub(super) fn unservable(
    model: &ModelConfig,
    device: DeviceChoice,
    budget: ByteCount,
    cache: &Path,
) -> Option<String> {
    let name = &model.name;
    let (what, allowed) = match model.max {
        Some(max) if max < budget => ("its max", max),
        _ => ("device_budget", budget),
    };
    if let Some(command) = &model.command {
        let bytes = command.device_bytes;
        return (bytes > allowed).then(|| {
            format!(
                "model {name:?} will fail: its device_bytes are {} bytes ({bytes}), and {what} is {} bytes ({allowed})",
                bytes.0, allowed.0
            )
        });
    }
    let directory = files_of(model, cache);
    if let Some(demo) = model.source.strip_prefix("demo:") {
        if !DEMO_MODELS.contains(&demo) {
            let known = DEMO_MODELS.join(", ");
            return Some(format!("model {name:?} will fail: the demo has no model {demo:?}; it has {known}"));
        }
        if directory.is_none() {
            return Some(format!(
                "model {name:?} will fail: the demo's model {demo:?} is not prepared yet; run `python -m shoal.demo \
                 prepare {demo}` (`make models` in a clone)"
            ));
        }
    }
    // What is still to be downloaded says nothing yet.
    let directory = directory?;
    if !directory.exists() {
        return Some(format!("model {name:?} will fail: there is no {}", model.source));
    }
    if !has_weights_of_its_own(model.engine) {
        return None;
    }
    // vLLM also reads a model from one file.
    if !directory.is_dir() && model.engine == Engine::Transformers {
        return Some(format!("model {name:?} will fail: {} is a file, not a directory", model.source));
    }
    let weights = weights_of(model, device, cache)?;
    (weights > allowed).then(|| {
        format!(
            "model {name:?} will fail: its weights need {} bytes of device memory ({weights}), and {what} is {} bytes \
             ({allowed})",
            weights.0, allowed.0
        )
    })
}

/// Its worker is ours and loads the files that `source` names.
const fn has_weights_of_its_own(engine: Engine) -> bool {
    matches!(engine, Engine::Transformers | Engine::Vllm)
}

/// What the model's weights take, as far as the headers of its files show now; none where they cannot be read (yet).
pub(super) fn weights_of(model: &ModelConfig, device: DeviceChoice, cache: &Path) -> Option<ByteCount> {
    if !has_weights_of_its_own(model.engine) {
        return None;
    }
    weights_bytes(&files_of(model, cache)?, model.dtype.as_deref(), matches!(device, DeviceChoice::Cuda(_)))
}

/// Where the model's files lie: its directory (which may not exist), or what is in a cache of a demo's or a hub's model;
/// none where nothing is there yet. `shoal.sources` decides when the worker starts; this is what it will find, as a rule.
fn files_of(model: &ModelConfig, cache: &Path) -> Option<PathBuf> {
    if Path::new(&model.source).is_absolute() {
        return Some(PathBuf::from(&model.source));
    }
    if let Some(demo) = model.source.strip_prefix("demo:") {
        return prepared_demo(demo, cache);
    }
    let (repo, own_revision) = model.source.split_once('@').unwrap_or((&model.source, "main"));
    let revision = model.revision.as_deref().unwrap_or(own_revision);
    let repo = repo.replace('/', "--");
    // Ours, and the one that the hub's own client keeps beside it.
    let others = cache.parent()?.join("huggingface/hub").join(format!("models--{repo}"));
    let places = [(cache.join("models/hub").join(repo), ""), (others, "snapshots")];
    places.into_iter().find_map(|(root, below)| {
        let named = std::fs::read_to_string(root.join("refs").join(revision)).ok();
        let commit = named.as_deref().map_or(revision, str::trim);
        Some(root.join(below).join(commit)).filter(|path| path.is_dir())
    })
}

/// What the weights need at least: those of the files, in `dtype` where one is set. On a GPU a worker left to choose may
/// take floats of two bytes.
fn weights_bytes(directory: &Path, dtype: Option<&str>, on_gpu: bool) -> Option<ByteCount> {
    let float_bytes = |own: u64| match dtype {
        Some("float32") => 4,
        Some("bfloat16" | "float16") => 2,
        _ if on_gpu => own.min(2),
        _ => own,
    };
    files(directory)?.into_iter().try_fold(ByteCount::ZERO, |sum, file| {
        sum.checked_add(tensor_bytes(open(&directory.join(file))?, float_bytes)?)
    })
}

/// What the tensors of one file take, where floats of so many bytes take `float_bytes`; none where the header is not one.
pub(crate) fn tensor_bytes(file: impl Read, float_bytes: impl Fn(u64) -> u64) -> Option<ByteCount> {
    let mut sum = 0u64;
    for (name, tensor) in header(file)? {
        if name == "__metadata__" {
            continue;
        }
        let Entry::Tensor { dtype, data_offsets: (begin, end) } = tensor else { return None };
        let stored = end.checked_sub(begin)?;
        let bytes = if FLOATS.contains(&dtype.as_str()) {
            let own = match dtype.as_str() {
                "F64" => 8,
                "F32" => 4,
                _ => 2,
            };
            (stored / own).checked_mul(float_bytes(own))?
        } else {
            stored
        };
        sum = sum.checked_add(bytes)?;
    }
    Some(ByteCount(sum))
}

/// The weights' files: those the index names, where there is one.
fn files(directory: &Path) -> Option<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    match std::fs::read(directory.join("model.safetensors.index.json")) {
        Ok(text) => {
            let index: Index = serde_json::from_slice(&text).ok()?;
            Some(index.weight_map.into_values().collect())
        }
        Err(_) => Some(BTreeSet::from(["model.safetensors".to_owned()])),
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Tensor { dtype: String, data_offsets: (u64, u64) },
    Other(IgnoredAny),
}

fn open(path: &Path) -> Option<File> {
    // Opening a pipe would wait for its writer.
    if !std::fs::metadata(path).ok()?.is_file() {
        return None;
    }
    File::open(path).ok()
}

fn header(mut file: impl Read) -> Option<BTreeMap<String, Entry>> {
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return None;
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = r#"{"__metadata__":{"format":"pt"},
        "w":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]},
        "i":{"dtype":"U8","shape":[16],"data_offsets":[4096,4112]}}"#;

    fn write(path: &Path, header: &str) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        std::fs::write(path, bytes).expect("written");
    }

    #[test]
    fn weights_are_counted_in_the_type_they_will_have() {
        let dir = tempfile::tempdir().expect("a directory");
        write(&dir.path().join("model.safetensors"), HEADER);
        let of = |dtype, on_gpu| weights_bytes(dir.path(), dtype, on_gpu).map(|bytes| bytes.0);
        assert_eq!(of(None, false), Some(4096 + 16));
        assert_eq!(of(Some("bfloat16"), false), Some(2048 + 16));
        assert_eq!(of(Some("float32"), true), Some(4096 + 16));
        assert_eq!(of(None, true), Some(2048 + 16), "the least it may need");
    }

    #[test]
    fn models_of_the_demo_are_known_by_name_and_found_where_they_are_made() {
        let cache = tempfile::tempdir().expect("a directory");
        for made in ["chat-2", "chat-10", "chat-11", "chat-10.partial"] {
            std::fs::create_dir_all(cache.path().join("models/demo").join(made)).expect("made");
        }
        assert_eq!(prepared_demo("chat", cache.path()), None, "no manifest: not made to its end");
        for made in ["chat-2", "chat-10", "chat-10.partial"] {
            std::fs::write(cache.path().join("models/demo").join(made).join("shoal-demo.json"), "{}")
                .expect("written");
        }
        assert_eq!(prepared_demo("chat", cache.path()), Some(cache.path().join("models/demo/chat-10")));
        assert_eq!(prepared_demo("code", cache.path()), None);
    }

    #[test]
    fn models_of_a_hub_are_found_in_either_cache() {
        let root = tempfile::tempdir().expect("a directory");
        let cache = root.path().join("shoal");
        let model = |source: &str, revision: Option<&str>| ModelConfig {
            revision: revision.map(str::to_owned),
            ..ModelConfig::new("a", source)
        };
        let weights = |model: &ModelConfig| weights_of(model, DeviceChoice::Sim, &cache).map(|bytes| bytes.0);
        assert_eq!(weights(&model("org/a", None)), None);
        for (files, refs) in [
            ("shoal/models/hub/org--a/c0ffee", "shoal/models/hub/org--a/refs/main"),
            ("huggingface/hub/models--org--b/snapshots/c0ffee", "huggingface/hub/models--org--b/refs/v1"),
        ] {
            let (files, refs) = (root.path().join(files), root.path().join(refs));
            std::fs::create_dir_all(&files).expect("made");
            std::fs::create_dir_all(refs.parent().expect("one")).expect("made");
            std::fs::write(refs, "c0ffee\n").expect("written");
            write(&files.join("model.safetensors"), HEADER);
        }
        assert_eq!(weights(&model("org/a", None)), Some(4112));
        assert_eq!(weights(&model("org/a@c0ffee", None)), Some(4112));
        assert_eq!(weights(&model("org/b", None)), None, "of another revision");
        assert_eq!(weights(&model("org/b@v1", None)), Some(4112));
        assert_eq!(weights(&model("org/b", Some("v1"))), Some(4112));
    }

    #[test]
    fn an_index_names_the_files() {
        let dir = tempfile::tempdir().expect("a directory");
        for file in ["1.safetensors", "2.safetensors", "unused.safetensors"] {
            write(&dir.path().join(file), HEADER);
        }
        let index = r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors","c":"1.safetensors"}}"#;
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).expect("written");
        assert_eq!(weights_bytes(dir.path(), None, false), Some(ByteCount(2 * 4112)));
        std::fs::remove_file(dir.path().join("2.safetensors")).expect("removed");
        assert_eq!(weights_bytes(dir.path(), None, false), None, "the worker says which is missing");
    }

    #[test]
    fn what_cannot_be_read_is_left_to_the_worker() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("model.safetensors");
        assert_eq!(weights_bytes(dir.path(), None, false), None);
        std::fs::write(&path, u64::MAX.to_le_bytes()).expect("written");
        assert_eq!(weights_bytes(dir.path(), None, false), None);
        for bad in ["", "[]", r#"{"w":{"dtype":"F32"}}"#, r#"{"w":{"dtype":"F32","data_offsets":[9,1]}}"#] {
            write(&path, bad);
            assert_eq!(weights_bytes(dir.path(), None, false), None, "{bad}");
        }
    }
}
