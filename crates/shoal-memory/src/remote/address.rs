//! Where a remote is and who asks it, as people write both: one line of a configuration, and one of a file.
//!
//! Apart because what is secret stands in files alone: an address is shown in logs and on a page.
//!
//! ```text
//! s3://HOST:PORT/BUCKET[/PREFIX][?region=REGION]    redis://HOST:PORT[/DATABASE]    /an/absolute/directory
//! ```

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{RedisSpec, RemoteSpec, S3Spec};
use crate::key_file;

/// The region that is signed for where none is named: what stores without regions answer to.
const REGION_DEFAULT: &str = "us-east-1";
/// What names in a Redis begin with: others may use it too.
const REDIS_PREFIX: &str = "shoal/";
/// A longer file is no login's.
const LOGIN_BYTES_MAX: u64 = 4096;

impl RemoteSpec {
    /// Reads an address, and the login for it: `ACCESS-KEY:SECRET-KEY` of an object store, which has to have one,
    /// `USER:PASSWORD` of a Redis, where the user may be empty. Nothing is asked of the remote.
    ///
    /// # Errors
    /// What is wrong, in words, which hold nothing of the login.
    pub fn parse(address: &str, login: Option<&str>) -> Result<Self, String> {
        let login = login
            .map(|login| {
                let (name, secret) = login.split_once(':').ok_or("the login is no NAME:SECRET")?;
                Ok::<_, &str>((name.to_owned(), secret.to_owned()))
            })
            .transpose()?;
        if address.contains("://") && address.contains('@') {
            // Not repeated: what stands before the @ may be a password.
            return Err("an address holds no login: it is the first line of a login file".to_owned());
        }
        let spec = match address.split_once("://") {
            Some(("s3", rest)) => Self::S3(s3(rest, login)?),
            Some(("redis", rest)) => Self::Redis(redis(rest, login)?),
            None if address.starts_with('/') && login.is_none() => Self::Directory(PathBuf::from(address)),
            None if address.starts_with('/') => return Err("a directory has no login".to_owned()),
            _ => {
                return Err(format!(
                    "{address:?} is none of s3://HOST:PORT/BUCKET, redis://HOST:PORT and an absolute path"
                ));
            }
        };
        spec.check()?;
        Ok(spec)
    }
}

/// Reads the login in a file: its first line.
///
/// # Errors
/// Why there is none, in words, which hold nothing of the file's content.
pub fn login_from_file(path: &Path) -> Result<String, String> {
    let wrong = |why: String| format!("no login in {}: {why}", path.display());
    let mut text = String::new();
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    key_file::warn_if_open(&file, path, "remote tier's login").map_err(|error| wrong(error.to_string()))?;
    file.take(LOGIN_BYTES_MAX).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
    let line = text.lines().next().unwrap_or_default().trim();
    match line.split_once(':') {
        Some((_, secret)) if !secret.is_empty() => Ok(line.to_owned()),
        _ => Err(wrong("its first line is no NAME:SECRET".to_owned())),
    }
}

/// `HOST:PORT`, with a port in it.
fn host_and_port(address: &str) -> Result<String, String> {
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
    match port.map(str::parse::<u16>) {
        Some(Ok(1..)) => Ok(address.to_owned()),
        _ => Err(format!("{address:?} is no HOST:PORT")),
    }
}

fn s3(rest: &str, login: Option<(String, String)>) -> Result<S3Spec, String> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let region = match query.split_once('=') {
        None if query.is_empty() => REGION_DEFAULT,
        Some(("region", region)) => region,
        _ => return Err(format!("{query:?}: only region=REGION may stand behind the question mark")),
    };
    let (address, path) = place.split_once('/').unwrap_or((place, ""));
    let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
    let prefix = prefix.trim_end_matches('/');
    let (access_key, secret_key) = login.ok_or("an object store has a login: ACCESS-KEY:SECRET-KEY")?;
    Ok(S3Spec {
        address: host_and_port(address)?,
        bucket: bucket.to_owned(),
        prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
        region: region.to_owned(),
        access_key,
        secret_key,
    })
}

fn redis(rest: &str, login: Option<(String, String)>) -> Result<RedisSpec, String> {
    let (address, database) = rest.split_once('/').unwrap_or((rest, ""));
    let database = match database {
        "" => 0,
        number => number.parse().map_err(|_| format!("{number:?} is no number of a database"))?,
    };
    Ok(RedisSpec {
        address: host_and_port(address)?,
        login,
        database,
        prefix: REDIS_PREFIX.to_owned(),
        keep: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_store_is_read() {
        let spec = RemoteSpec::parse("s3://10.0.0.1:9000/blocks/kv/a/?region=eu-1", Some("name:se:cret"));
        let RemoteSpec::S3(spec) = spec.expect("an address") else { panic!("an object store") };
        assert_eq!((spec.address.as_str(), spec.bucket.as_str()), ("10.0.0.1:9000", "blocks"));
        assert_eq!((spec.prefix.as_str(), spec.region.as_str()), ("kv/a/", "eu-1"));
        assert_eq!((spec.access_key.as_str(), spec.secret_key.as_str()), ("name", "se:cret"));
        let spec = RemoteSpec::parse("s3://store:80/blocks", Some("name:secret"));
        let RemoteSpec::S3(spec) = spec.expect("an address") else { panic!("an object store") };
        assert_eq!((spec.prefix.as_str(), spec.region.as_str()), ("", REGION_DEFAULT));
    }

    #[test]
    fn a_redis_and_a_directory_are_read() {
        let spec = RemoteSpec::parse("redis://[::1]:6379/3", Some(":password"));
        let RemoteSpec::Redis(spec) = spec.expect("an address") else { panic!("a Redis") };
        assert_eq!((spec.address.as_str(), spec.database), ("[::1]:6379", 3));
        assert_eq!(spec.login, Some((String::new(), "password".to_owned())));
        let spec = RemoteSpec::parse("/mnt/shared/kv", None).expect("an address");
        assert!(matches!(spec, RemoteSpec::Directory(path) if path == Path::new("/mnt/shared/kv")));
    }

    #[test]
    fn what_is_wrong_is_said_without_the_login() {
        for (address, login, why) in [
            ("s3://store:9000/blocks", None, "has a login"),
            ("s3://store:9000/blocks", Some("secret"), "no NAME:SECRET"),
            ("s3://store/blocks", Some("a:secret"), "\"store\" is no HOST:PORT"),
            ("s3://store:9000", Some("a:secret"), "bucket \"\""),
            ("s3://store:9000/b/../c", Some("a:secret"), "are no names"),
            ("s3://store:9000/b?zone=1", Some("a:secret"), "only region=REGION"),
            ("redis://store:70000", None, "is no HOST:PORT"),
            ("redis://:secret@store:6379", None, "holds no login"),
            ("s3://a:secret@store:9000/blocks", Some("a:b"), "holds no login"),
            ("redis://store:6379/one", None, "\"one\" is no number"),
            ("https://store:9000/b", Some("a:secret"), "is none of s3://"),
            ("kv/here", None, "an absolute path"),
            ("/mnt/kv", Some("a:secret"), "a directory has no login"),
        ] {
            let said = RemoteSpec::parse(address, login).expect_err(address);
            assert!(said.contains(why) && !said.contains("secret"), "{address}: {said}");
        }
    }

    #[test]
    fn a_login_is_the_first_line_of_its_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("login");
        std::fs::write(&file, "name:secret\r\nmore\n").expect("a file");
        assert_eq!(login_from_file(&file).as_deref(), Ok("name:secret"));
        for text in ["", "name", "name:", "name:\nsecret:x"] {
            std::fs::write(&file, text).expect("a file");
            let said = login_from_file(&file).expect_err("no login");
            assert!(said.contains("no NAME:SECRET") && !said.contains("secret"), "{said}");
        }
        assert!(login_from_file(&dir.path().join("none")).expect_err("no file").contains("No such file"));
    }
}
