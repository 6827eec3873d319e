//! Which process a number means: numbers are used again, so a process is its number and its start.

use std::path::Path;

/// When a process began, in ticks since the machine's start; none where there is no such process, or only what is left of
/// one that ended (a zombie, whose memory is gone).
#[must_use]
pub(crate) fn started(pid: u32) -> Option<u64> {
    seen(pid).filter(|seen| !seen.is_over).map(|seen| seen.start)
}

/// What is seen of a process, or of what is left of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) parent: u32,
    pub(crate) group: u32,
    /// In ticks since the machine's start.
    pub(crate) start: u64,
    /// It has ended; its parent has not waited for it.
    pub(crate) is_over: bool,
}

/// None where there is no such process.
#[must_use]
pub(crate) fn seen(pid: u32) -> Option<Seen> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name stands in brackets and may hold anything. Behind it: state, parent and group; the start is the twentieth.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Seen {
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        start: fields.get(19)?.parse().ok()?,
        is_over: matches!(*fields.first()?, "Z" | "X"),
    })
}

/// Every process that can be seen, ended ones included. Reads a file of each: not for a thread of the runtime.
pub(super) fn all() -> Vec<(u32, Seen)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, seen(pid)?))).collect()
}

/// The machine's present life: numbers and starts of another one mean nothing.
#[must_use]
pub(crate) fn boot() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_another_and_from_what_is_left_of_it() {
        let own = started(std::process::id()).expect("we run");
        assert_eq!(started(std::process::id()), Some(own));
        let mut other = std::process::Command::new("sleep").arg("100").spawn().expect("a process");
        assert!(started(other.id()).expect("it runs") >= own);
        other.kill().expect("it runs");
        let pid = other.id();
        let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
        while started(pid).is_some() {
            assert!(std::time::Instant::now() < deadline, "what is left of it is taken for it");
        }
        let left = seen(pid).expect("nobody has waited for it");
        assert!(left.is_over && left.parent == std::process::id());
        assert!(all().contains(&(pid, left)));
        other.wait().expect("ended");
        assert_eq!((started(pid), seen(pid)), (None, None));
    }
}
