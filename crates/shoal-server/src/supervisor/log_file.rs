//! Where a worker's output goes, bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A log longer than this is put aside (as `NAME.log.1`, replacing the one before) when its worker next starts.
pub const LOG_BYTES_MAX: u64 = 16 << 20;

/// How far back the last line of a log is looked for.
const LAST_BYTES_MAX: u64 = 8 << 10;
/// How much of it is shown.
const LAST_LINE_CHARS_MAX: usize = 240;

/// Open a log to append to (0600), putting a long one aside first.
///
/// # Errors
/// The directory cannot be written.
pub fn open_log(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".1");
        std::fs::rename(path, aside)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// The last lines of a log, `bytes_max` at most, from the first whole line on. Empty where there is no log.
#[must_use]
pub fn tail(path: &Path, bytes_max: u64) -> String {
    let read = || -> io::Result<String> {
        let mut log = File::open(path)?;
        let from = log.metadata()?.len().saturating_sub(bytes_max);
        log.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        log.take(bytes_max).read_to_end(&mut bytes)?;
        let start = if from == 0 { 0 } else { bytes.iter().position(|b| *b == b'\n').map_or(0, |at| at + 1) };
        Ok(String::from_utf8_lossy(&bytes[start..]).into_owned())
    };
    read().unwrap_or_default()
}

/// The last line of a log that is not blank, among what was written from `from` on: without control characters, and
/// its beginning where it is long.
#[must_use]
pub fn last_line(path: &Path, from: u64) -> Option<String> {
    let mut log = File::open(path).ok()?;
    let near = log.metadata().ok()?.len().saturating_sub(LAST_BYTES_MAX);
    log.seek(SeekFrom::Start(from.max(near))).ok()?;
    let mut bytes = Vec::new();
    log.take(LAST_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    let mut shown: String = line.chars().take(LAST_LINE_CHARS_MAX).collect();
    if shown.len() < line.len() {
        shown.push_str("...");
    }
    Some(shown)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn appends_turns_and_tails() -> io::Result<()> {
        let scratch = tempfile::tempdir()?;
        let path = scratch.path().join("ash.log");
        open_log(&path)?.write_all(b"one\n")?;
        open_log(&path)?.write_all(b"two\nthree\n")?;
        assert_eq!(tail(&path, 1000), "one\ntwo\nthree\n");
        assert_eq!(tail(&path, 8), "three\n");
        assert_eq!(last_line(&path, 0).as_deref(), Some("three"));
        assert_eq!(last_line(&path, 14), None);
        open_log(&path)?.write_all(format!("\x1b[31m{}\n\n", "x".repeat(500)).as_bytes())?;
        let long = last_line(&path, 14).unwrap_or_default();
        assert!(long.starts_with("[31mxxx") && long.ends_with("x...") && long.len() == 243, "{long}");
        File::options().write(true).open(&path)?.set_len(LOG_BYTES_MAX + 1)?;
        open_log(&path)?.write_all(b"fresh\n")?;
        assert_eq!(tail(&path, 1000), "fresh\n");
        assert!(scratch.path().join("ash.log.1").exists());
        assert_eq!(tail(&scratch.path().join("none.log"), 10), "");
        Ok(())
    }
}
