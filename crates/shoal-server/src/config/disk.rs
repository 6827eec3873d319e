//! The disk tier: what its entries must be, and what of it each model gets.
//!
//! Apart because it is shared out by a rule of its own: each model whose worker can use it has a directory in each entry's
//! directory, and an equal part of its bytes.

use std::path::{Path, PathBuf};

use shoal_core::bytes::ByteCount;
use shoal_memory::disk::DiskKey;

use super::error::{Problem, ProblemKind};
use super::parse::{ModelSection, Sited};
use super::{DiskTier, Engine, ModelConfig, RemoteConfig, ServerConfig};

/// The least that a model can use of an entry.
pub(super) const DISK_SHARE_MIN: ByteCount = ByteCount::mib(64);

impl ServerConfig {
    /// What `model`'s worker is told of the disk tier; null where it has none.
    pub(super) fn disk_of(&self, model: &ModelConfig) -> serde_json::Value {
        let sharing = self.models.iter().filter(|model| keeps_kv(model.engine, model.prefix_caching)).count();
        if !keeps_kv(model.engine, model.prefix_caching) || self.disk.is_empty() || sharing == 0 {
            return serde_json::Value::Null;
        }
        let part = |bytes: ByteCount| ByteCount(bytes.0 / sharing as u64);
        // What weights may write comes off.
        let writes = |disk: &DiskTier| ByteCount(disk.write_bytes_per_hour.0 - disk.weights_writes().0);
        let entry = |disk: &DiskTier| {
            serde_json::json!({
                "path": disk.path.join(format!("kv-{}", model.name)),
                "bytes": part(disk.bytes).max(DISK_SHARE_MIN),
                "write_bytes_per_hour": part(writes(disk)),
            })
        };
        self.disk.iter().map(entry).collect()
    }

    /// Where `model`'s worker keeps weights at rest, with those of all others; null where it does not.
    pub(super) fn weights_of(&self, model: &ModelConfig) -> serde_json::Value {
        let disk = self.disk.iter().find_map(|disk| Some((disk, disk.weights?)));
        disk.filter(|_| matches!(model.engine, Engine::Transformers)).map_or(
            serde_json::Value::Null,
            |(disk, bytes)| {
                serde_json::json!({
                    "path": disk.path.join("weights"),
                    "bytes": bytes,
                    "write_bytes_per_hour": disk.weights_writes(),
                })
            },
        )
    }

    /// What `model`'s worker is told of the remote tier; null where it has none. Names tell models apart there.
    pub(super) fn remote_of(&self, model: &ModelConfig) -> serde_json::Value {
        let remote = self.tiers.remote().filter(|_| keeps_kv(model.engine, model.prefix_caching));
        remote.map_or(serde_json::Value::Null, RemoteConfig::told)
    }
}

impl DiskTier {
    /// What an hour's allowance has for weights: as large a part of it as they may have of the bytes.
    fn weights_writes(&self) -> ByteCount {
        let weights = u128::from(self.weights.unwrap_or_default().0);
        let all = (weights + u128::from(self.bytes.0)).max(1);
        let part = u128::from(self.write_bytes_per_hour.0) * weights / all;
        ByteCount(u64::try_from(part).unwrap_or(u64::MAX))
    }
}

/// Whether a model's worker keeps KV in tiers below the device.
pub(super) const fn keeps_kv(engine: Engine, prefix_caching: bool) -> bool {
    matches!(engine, Engine::Transformers) && prefix_caching
}

/// Checks the entries, whose paths are absolute by now.
pub(super) fn check_disk(
    disks: &[Sited<DiskTier>],
    models: &[ModelSection],
    is_encrypted: bool,
    problems: &mut Vec<Problem>,
) {
    let engine =
        |model: &ModelSection| model.engine.as_ref().map_or_else(Engine::default, |engine| engine.value);
    let sharing = models.iter().filter(|model| keeps_kv(engine(model), model.prefix_caching)).count();
    for (place, disk) in disks.iter().enumerate() {
        let DiskTier { path, bytes, .. } = &disk.value;
        let mut bad = |key: &str, why: String| {
            problems.push(disk.problem(ProblemKind::BadValue { key: key.to_owned(), why }));
        };
        let shown = path.display();
        let least = ByteCount(DISK_SHARE_MIN.0 * sharing.max(1) as u64);
        if *bytes < least {
            let each = if sharing > 1 {
                format!(", {DISK_SHARE_MIN} for each of {sharing} models")
            } else {
                String::new()
            };
            bad("bytes", format!("{bytes} is too little: at least {least}{each}"));
        }
        if let Some(weights) = disk.value.weights.filter(|weights| *weights < DISK_SHARE_MIN) {
            bad("weights", format!("{weights} is too little: at least {DISK_SHARE_MIN}"));
        }
        if disk.value.weights.is_some() {
            if is_encrypted {
                let why = "weights are not encrypted, and `disk_key_file` says that what is on disk shall be";
                bad("weights", format!("{why}: leave one of the two out"));
            }
            if disks[..place].iter().any(|before| before.value.weights.is_some()) {
                bad("weights", "they are kept in one place, and an entry before this one has it".to_owned());
            }
        }
        let here = lies_at(path);
        let before = disks[..place].iter().map(|before| &before.value.path);
        if let Some(other) = before.into_iter().find(|other| is_within(&here, &lies_at(other))) {
            let why = if is_within(path, other) {
                format!("{shown} is named twice, or lies in the one before")
            } else {
                format!("{shown} is {} by its links, where {} lies too", here.display(), other.display())
            };
            bad("path", format!("{why}; give each disk a directory of its own"));
        }
        if path.exists() && !path.is_dir() {
            bad("path", format!("{shown} is not a directory"));
        }
    }
}

/// Checks the file that is named for the key: workers would serve without a disk, and few would see why.
pub(super) fn check_key(file: &Sited<PathBuf>, problems: &mut Vec<Problem>) {
    if let Err(error) = DiskKey::from_file(&file.value) {
        let kind = ProblemKind::BadValue { key: "disk_key_file".to_owned(), why: error.to_string() };
        problems.push(file.problem(kind));
    }
}

/// Where a directory lies, which need not be there yet: what is there of its path, without links, and the rest.
fn lies_at(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|there| Some(there.canonicalize().ok()?.join(path.strip_prefix(there).ok()?)))
        // An empty rest would leave a slash at the end, which does not count in comparisons.
        .unwrap_or_else(|| path.to_owned())
}

/// Whether one of two paths holds the other, or both are the same.
fn is_within(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

#[cfg(test)]
mod tests {
    use super::super::tests::load_here;
    use super::*;

    #[test]
    fn a_file_without_a_key_is_named_with_its_line() {
        for (path, why) in [("/nowhere/key", "No such file"), ("/dev/null", "it has 0 bytes, not 32")] {
            let file = Sited { value: PathBuf::from(path), line: 2, column: 17 };
            let mut problems = Vec::new();
            check_key(&file, &mut problems);
            let [problem] = &problems[..] else { panic!("{problems:?}") };
            let said = problem.kind.to_string();
            assert_eq!((problem.line, problem.column), (2, 17));
            assert!(said.starts_with(&format!("`disk_key_file`: no key in {path}: {why}")), "{said}");
        }
    }

    #[test]
    fn all_transformers_models_keep_weights_in_one_place() {
        let models = "[[model]]\nname = 'a'\nsource = 'org/a'\nprefix_caching = false\n\
                      [[model]]\nname = 'b'\nsource = 'org/b'\n[[model]]\nname = 'c'\nsource = 'org/c'\nengine = 'vllm'\n";
        let told = |disk: &str| {
            let config = load_here(&format!("[server]\n{disk}\n{models}")).expect("good");
            ["a", "b", "c"]
                .map(|name| config.spec_of(config.model(name).expect("it is there"))["weights"].clone())
        };
        let [a, b, c] = told(
            "disk = [{ path = '/a', bytes = '1GiB' }, { path = '/b', bytes = '1GiB', weights = '2GiB' }]",
        );
        let gib = ByteCount::gib;
        assert_eq!(
            a,
            serde_json::json!({"path": "/b/weights", "bytes": gib(2), "write_bytes_per_hour": gib(2)})
        );
        assert_eq!((a, c.is_null()), (b, true));
        assert!(told("disk = [{ path = '/a', bytes = '1GiB' }]").iter().all(serde_json::Value::is_null));
        let refused =
            |server: &str| load_here(&format!("[server]\n{server}\n{models}")).expect_err("refused");
        let error = refused("disk = [{ path = '/tmp', bytes = '1GiB', weights = '1MiB' }]");
        assert!(error.contains("`weights`: 1 MiB is too little: at least 64 MiB"), "{error}");
        let entry = |path| format!("{{ path = '{path}', bytes = '1GiB', weights = '1GiB' }}");
        let error = refused(&format!("disk = [{}, {}]", entry("/a"), entry("/b")));
        assert!(error.contains("`weights`: they are kept in one place"), "{error}");
    }

    #[test]
    fn kv_and_weights_share_what_may_be_written_in_an_hour() {
        let told = |entry: &str| {
            let disk = format!("[server]\ndisk = [{{ path = '/a', bytes = '1GiB', {entry} }}]");
            let config =
                load_here(&format!("{disk}\n[[model]]\nname = 'a'\nsource = 'org/a'")).expect("good");
            let spec = config.spec_of(config.model("a").expect("it is there"));
            [&spec["disk"][0], &spec["weights"]].map(|share| share["write_bytes_per_hour"].clone())
        };
        let mib = |number| serde_json::json!(ByteCount::mib(number));
        assert_eq!(told("weights = '3GiB'"), [mib(1024), mib(3072)]);
        assert_eq!(told("weights = '3GiB', write_bytes_per_hour = '1GiB'"), [mib(256), mib(768)]);
    }

    #[test]
    fn weights_are_not_kept_beside_what_is_encrypted() {
        use std::os::unix::fs::OpenOptionsExt;
        let folder = tempfile::tempdir().expect("a directory");
        let key = folder.path().join("key");
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&key);
        std::io::Write::write_all(&mut file.expect("made"), &[7; 32]).expect("written");
        let server = |weights: &str| {
            let disk = format!("disk = [{{ path = '/a', bytes = '1GiB'{weights} }}]");
            let model = "[[model]]\nname = 'a'\nsource = 'org/a'";
            load_here(&format!("[server]\n{disk}\ndisk_key_file = '{}'\n{model}", key.display()))
        };
        server("").expect("KV is encrypted");
        let error = server(", weights = '1GiB'").expect_err("they would not be");
        assert!(error.contains("`weights`: weights are not encrypted"), "{error}");
    }
}
