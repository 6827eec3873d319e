//! What a command takes of the simulated device, seen from outside: it has no words for it, unlike a worker of ours.
//!
//! That device is RAM, so it is the RAM of the group: private pages whole, shared ones in part. On a GPU it is what the
//! driver shows of the group, which the core knows from its readings.

use std::path::Path;

use shoal_core::bytes::ByteCount;

use super::identity;

/// The RAM that the group that `leader` leads takes now; none where that cannot be told. Reads files of every process: not
/// for a thread of the runtime.
#[must_use]
pub fn ram_of_group(leader: u32) -> Option<ByteCount> {
    let sum: ByteCount = processes_of(leader).into_iter().filter_map(ram_of).sum();
    (!sum.is_zero()).then_some(sum)
}

fn processes_of(leader: u32) -> Vec<u32> {
    identity::all().into_iter().filter(|(_, seen)| seen.group == leader).map(|(pid, _)| pid).collect()
}

/// The process group of a process; none where it cannot be seen.
pub(crate) fn group_of(pid: u32) -> Option<u32> {
    identity::seen(pid).map(|seen| seen.group)
}

fn ram_of(pid: u32) -> Option<ByteCount> {
    let directory = Path::new("/proc").join(pid.to_string());
    let rollup = std::fs::read_to_string(directory.join("smaps_rollup")).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| ByteCount(kib << 10))
    };
    field(&rollup, "Pss:").or_else(|| {
        let status = std::fs::read_to_string(directory.join("status")).ok()?;
        field(&status, "VmRSS:")
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_group_is_measured_with_all_its_processes() {
        let mut program = Command::new("/bin/sh")
            .args(["-c", "sh -c 'echo; read -r x' <&0; :"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("a process");
        let mut said = [0];
        std::io::Read::read_exact(program.stdout.as_mut().expect("a pipe"), &mut said).expect("it runs");
        assert_eq!(processes_of(program.id()).len(), 2);
        let bytes = ram_of_group(program.id()).expect("it runs");
        assert!(bytes > ByteCount(64 << 10) && bytes < ByteCount::gib(1), "{bytes}");
        drop(program.stdin.take());
        program.wait().expect("it ends");
        assert_eq!(ram_of_group(program.id()), None);
    }
}
