//! The remote tier of `[server]`: `tier_remote` and the files beside it.
//!
//! Apart because none of its secrets stands in the configuration: files have them, which are looked into at the start, since
//! workers would serve without the remote and few would see why.

use std::path::{Path, PathBuf};

use shoal_memory::remote::{RemoteKey, RemoteSpec, login_from_file};
use toml::de::DeTable;

use super::error::{Problem, ProblemKind};
use super::parse::{Reader, Sited, nonempty, path};

/// The key that needs another one.
const KEY: &str = "tier_remote";
const KEY_FILE: &str = "tier_remote_key_file";
const LOGIN_FILE: &str = "tier_remote_login_file";

/// As written, or with absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// Where it is, as [`RemoteSpec::parse`] reads it.
    pub address: String,
    /// The key that its objects are believed by.
    pub key_file: PathBuf,
    /// Who asks; none where nobody has to say so.
    pub login_file: Option<PathBuf>,
}

impl RemoteConfig {
    pub(super) fn read<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>) -> Option<Sited<Self>> {
        let address = reader.parsed(table, KEY, |text| nonempty(text).map(str::to_owned));
        let key_file = reader.parsed(table, KEY_FILE, path);
        let login_file = reader.parsed(table, LOGIN_FILE, path);
        let Some(address) = address else {
            for (key, file) in [(KEY_FILE, &key_file), (LOGIN_FILE, &login_file)] {
                if let (Some(_), Some(value), None) = (file, table.get(key), table.get(KEY)) {
                    reader.bad(value, key, format!("there is no `{KEY}` that it is for"));
                }
            }
            return None;
        };
        let Some(key_file) = key_file else {
            if let (Some(value), None) = (table.get(KEY), table.get(KEY_FILE)) {
                let why = format!(
                    "objects of a remote are believed by a key: name its file in `{KEY_FILE}` \
                     (`openssl rand -hex 32` makes one), the same on all servers that share the remote"
                );
                reader.bad(value, KEY, why);
            }
            return None;
        };
        let login_file = login_file.map(|file| file.value);
        let Sited { value, line, column } = address;
        Some(Sited { value: Self { address: value, key_file: key_file.value, login_file }, line, column })
    }

    /// Makes paths absolute; what cannot be is a problem.
    pub(super) fn resolve(
        said: &mut Sited<Self>,
        absolute: impl Fn(&Path) -> PathBuf,
        problems: &mut Vec<Problem>,
    ) {
        let remote = &mut said.value;
        remote.key_file = absolute(&remote.key_file);
        remote.login_file = remote.login_file.as_deref().map(absolute);
        for (key, why) in said.value.faults() {
            problems.push(said.problem(ProblemKind::BadValue { key: key.to_owned(), why }));
        }
    }

    /// What is wrong, by key.
    fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        if let Err(why) = RemoteKey::from_file(&self.key_file) {
            faults.push((KEY_FILE, why));
        }
        let login = match self.login_file.as_deref().map(login_from_file).transpose() {
            Ok(login) => login,
            Err(why) => {
                faults.push((LOGIN_FILE, why));
                return faults;
            }
        };
        if let Err(why) = RemoteSpec::parse(&self.address, login.as_deref()) {
            faults.push((KEY, why));
        }
        faults
    }

    /// As workers are told.
    pub(super) fn told(&self) -> serde_json::Value {
        serde_json::json!({
            "address": self.address,
            "key_file": self.key_file,
            "login_file": self.login_file,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn remote(address: &str, key_file: &Path, login_file: Option<&Path>) -> Sited<RemoteConfig> {
        let value = RemoteConfig {
            address: address.to_owned(),
            key_file: key_file.to_owned(),
            login_file: login_file.map(Path::to_owned),
        };
        Sited { value, line: 2, column: 15 }
    }

    #[test]
    fn what_cannot_be_is_said_with_its_key_and_line() {
        let folder = tempfile::tempdir().expect("a directory");
        let (key, login) = (folder.path().join("key"), folder.path().join("login"));
        std::fs::write(&key, "07".repeat(32)).expect("a file");
        std::fs::write(&login, "name:secret").expect("a file");
        let none = folder.path().join("none");
        for (address, key_file, login_file, said) in [
            ("/mnt/kv", &none, None, Some("`tier_remote_key_file`: no key in ")),
            ("s3://store:9000/b", &key, Some(&none), Some("`tier_remote_login_file`: no login in ")),
            ("s3://store:9000/b", &key, None, Some("`tier_remote`: an object store has a login")),
            ("ftp://store", &key, None, Some("`tier_remote`: \"ftp://store\" is none of ")),
            ("s3://store:9000/b", &key, Some(&login), None),
            ("redis://store:6379", &key, None, None),
            ("/mnt/kv", &key, None, None),
        ] {
            let mut problems = Vec::new();
            let mut remote = remote(address, key_file, login_file.map(PathBuf::as_path));
            RemoteConfig::resolve(&mut remote, Path::to_owned, &mut problems);
            let told: Vec<String> = problems.iter().map(|problem| problem.kind.to_string()).collect();
            match said {
                Some(said) => assert!(told.len() == 1 && told[0].starts_with(said), "{address}: {told:?}"),
                None => assert!(told.is_empty(), "{address}: {told:?}"),
            }
            assert!(problems.iter().all(|problem| (problem.line, problem.column) == (2, 15)));
            assert!(told.iter().all(|told| !told.contains("secret")));
        }
    }

    #[test]
    fn files_and_address_need_each_other() {
        let model = "[[model]]\nname = 'a'\nsource = 'org/a'\n";
        let said = |lines: &str| {
            let problems = parse(&format!("[server]\n{lines}\n{model}")).expect_err("it is wrong");
            let [problem] = &problems[..] else { panic!("{problems:?}") };
            format!("{} {}", problem.line, problem.kind)
        };
        let told = said("tier_remote = '/mnt/kv'");
        assert!(told.starts_with("2 `tier_remote`: objects of a remote are believed by a key"), "{told}");
        for key in [KEY_FILE, LOGIN_FILE] {
            let told = said(&format!("{key} = '/etc/file'"));
            assert_eq!(told, format!("2 `{key}`: there is no `tier_remote` that it is for"));
        }
        let file =
            parse(&format!("[server]\ntier_remote = '/mnt/kv'\ntier_remote_key_file = 'key'\n{model}"));
        let tiers = file.expect("it is right").server.tiers;
        assert_eq!(tiers.remote().map(|remote| remote.key_file.as_path()), Some(Path::new("key")));
    }
}
