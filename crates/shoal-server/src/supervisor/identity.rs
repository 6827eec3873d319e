//! Which process a number means: numbers are used again, so a process is its number and its start.

use std::path::Path;

/// When a process began, in ticks since the machine's start; none where there is no such process, or only what is left of
/// one that ended (a zombie, whose memory is gone).
#[must_use]
pub(crate) fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name stands in brackets and may hold anything. Behind it: the state is the first field, the start the twentieth.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
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
        other.wait().expect("ended");
        assert_eq!(started(pid), None);
    }
}
