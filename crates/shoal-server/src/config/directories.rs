//! Directories that are ours alone: sockets in a directory that somebody else prepared would be theirs to take.

use std::io::{Error, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Makes `dir` (and what leads to it) with mode 0700, or sees that it is a directory of this user and closes it to others.
///
/// # Errors
/// The system's, with the path; `PermissionDenied` where it belongs to another user, `NotADirectory` where it is a link or a
/// file.
pub fn make_private(dir: &Path) -> Result<(), Error> {
    let told = |error: Error| Error::new(error.kind(), format!("{}: {error}", dir.display()));
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).map_err(told)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => return made.map_err(told),
    }
    let found = std::fs::symlink_metadata(dir).map_err(told)?;
    if !found.is_dir() {
        return Err(told(Error::new(
            ErrorKind::NotADirectory,
            "it is no directory; remove it, or choose another",
        )));
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        let whose = format!("it belongs to user {}; choose another", found.uid());
        return Err(told(Error::new(ErrorKind::PermissionDenied, whose)));
    }
    if found.mode() & 0o077 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(told)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_directory_is_made_or_closed_to_others() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("a/b");
        let mode = || std::fs::metadata(&dir).expect("there").mode() & 0o777;
        make_private(&dir).expect("made");
        assert_eq!(mode(), 0o700);
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).expect("opened");
        make_private(&dir).expect("closed");
        assert_eq!(mode(), 0o700);
    }

    #[test]
    fn links_and_files_are_refused_with_their_path() {
        let root = tempfile::tempdir().expect("a directory");
        let (link, file) = (root.path().join("link"), root.path().join("file"));
        std::os::unix::fs::symlink(root.path(), &link).expect("linked");
        std::fs::write(&file, "").expect("written");
        for path in [link, file.clone(), file.join("below")] {
            let error = make_private(&path).expect_err("not ours");
            assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
        }
    }
}
