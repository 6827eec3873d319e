//! What copies cost on a device, kept in a file from one process to the next.
//!
//! Apart because a file is never to be trusted: it may be cut short, of another device or driver, or somebody else's. The
//! first line is a hash of all that follows, the second says for what it was measured; anything else is no file, and is
//! measured anew. It is written beside its place and renamed, so that a reader finds the old one or the new one.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process;

use shoal_core::copy_plan::costs::CopyCosts;

use crate::hash::hash_bytes;

/// No table is nearly as long.
const BYTES_MAX: u64 = 64 << 10;

/// Where tables are kept: `$XDG_CACHE_HOME/shoal`, or `~/.cache/shoal`. `None` for a process without a home.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CUDA device asks"))]
pub(crate) fn directory() -> Option<PathBuf> {
    let absolute = |name: &str, below: &str| {
        let path = PathBuf::from(env::var_os(name)?);
        path.is_absolute().then(|| path.join(below))
    };
    Some(absolute("XDG_CACHE_HOME", "").or_else(|| absolute("HOME", ".cache"))?.join("shoal"))
}

fn path(directory: &Path, key: &str) -> PathBuf {
    directory.join(format!("copy-costs-{:016x}.json", hash_bytes(key.as_bytes())))
}

fn sealed(key: &str, table: &str) -> String {
    let body = format!("{key}\n{table}\n");
    format!("{:016x}\n{body}", hash_bytes(body.as_bytes()))
}

fn unsealed(text: &str, key: &str) -> Option<CopyCosts> {
    let (seal, body) = text.split_once('\n')?;
    if seal != format!("{:016x}", hash_bytes(body.as_bytes())) {
        return None;
    }
    let (of, table) = body.strip_suffix('\n')?.split_once('\n')?;
    if of != key {
        return None;
    }
    CopyCosts::parse(table).ok()
}

/// The table that was measured for `key` (one line), if there is a good one.
pub(crate) fn load(directory: &Path, key: &str) -> Option<CopyCosts> {
    let file = File::open(path(directory, key)).ok()?;
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
    unsealed(core::str::from_utf8(&bytes).ok()?, key)
}

/// Keeps a table for `key`.
///
/// # Errors
/// What the file system says; the file that was there stays.
pub(crate) fn store(directory: &Path, key: &str, costs: &CopyCosts) -> io::Result<()> {
    let table = costs.text().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    fs::create_dir_all(directory)?;
    let target = path(directory, key);
    let beside = target.with_extension(format!("{}.new", process::id()));
    let written = File::create(&beside)
        .and_then(|mut file| file.write_all(sealed(key, &table).as_bytes()))
        .and_then(|()| fs::rename(&beside, &target));
    if written.is_err() {
        // What is left of it is in nobody's way.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use proptest::prelude::*;
    use shoal_core::copy_plan::costs::Costs;

    use super::*;

    const KEY: &str = "some GPU, driver 1";

    fn costs() -> CopyCosts {
        CopyCosts::new(Costs::guess(true, true), Costs::guess(false, true))
    }

    #[test]
    fn a_table_is_kept_for_its_key_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("deep/er");
        assert_eq!(load(&place, KEY), None);
        store(&place, KEY, &costs()).unwrap();
        assert_eq!(load(&place, KEY), Some(costs()));
        assert_eq!(load(&place, "some GPU, driver 2"), None);
        // Even under the other's name.
        fs::copy(path(&place, KEY), path(&place, "other")).unwrap();
        assert_eq!(load(&place, "other"), None);
        let other = CopyCosts::new(Costs::guess(false, false), Costs::guess(false, false));
        store(&place, KEY, &other).unwrap();
        assert_eq!(load(&place, KEY), Some(other));
        assert_eq!(fs::read_dir(&place).unwrap().count(), 2, "nothing is left beside");
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        store(&file, KEY, &costs()).unwrap_err();
        // A directory in the file's place.
        fs::create_dir(path(dir.path(), KEY)).unwrap();
        store(dir.path(), KEY, &costs()).unwrap_err();
        assert_eq!(load(dir.path(), KEY), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_file_that_goes_on_for_ever_is_not_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut text = sealed(KEY, &costs().text().unwrap());
        text.push_str(&" ".repeat(1 << 20));
        fs::write(path(dir.path(), KEY), text).unwrap();
        assert_eq!(load(dir.path(), KEY), None);
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_no_file(at in any::<prop::sample::Index>(), flip in 1..=255_u8, cut in any::<bool>()) {
            let mut bytes = sealed(KEY, &costs().text().unwrap()).into_bytes();
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= flip;
            }
            let text = String::from_utf8_lossy(&bytes);
            prop_assert_eq!(unsealed(&text, KEY), None);
        }

        #[test]
        fn noise_is_no_file(text in "(?s).{0,300}") {
            prop_assert_eq!(unsealed(&text, KEY), None);
        }
    }
}
