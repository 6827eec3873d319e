//! Ends a command when the server is gone, however the server went.
//!
//! Our own workers ask the kernel for a signal at their parent's death; any other program does not. So a shell stands
//! beside it, which waits for the end of a pipe that only the server holds open, and kills the program's group then.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Waits for the end of the pipe; nothing is ever written to it.
const SCRIPT: &str = r#"read -r _; kill -s KILL -- "-$1""#;

/// Stands beside one program. Dropping it lets the program be.
#[derive(Debug)]
pub struct Watcher {
    shell: Child,
}

impl Watcher {
    /// Watches over the process group that `pid` leads.
    ///
    /// # Errors
    /// There is no shell, or no process can be started.
    pub fn over(pid: u32) -> std::io::Result<Self> {
        let shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "shoal-watcher", &pid.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C in the terminal is not for it.
            .process_group(0)
            .spawn()?;
        Ok(Self { shell })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Before the pipe ends, which is dropped after this.
        if let Err(error) = self.shell.kill().and_then(|()| self.shell.wait()) {
            tracing::debug!(%error, "a watcher could not be waited for");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn sleeper() -> Child {
        Command::new("/bin/sh")
            .args(["-c", "sleep 100 & sleep 100"])
            .process_group(0)
            .spawn()
            .expect("a process")
    }

    #[test]
    fn the_end_of_the_pipe_ends_the_group_and_letting_it_be_does_not() {
        let mut program = sleeper();
        drop(Watcher::over(program.id()).expect("a shell"));
        assert!(program.try_wait().expect("known").is_none(), "it was let be");
        let mut watcher = Watcher::over(program.id()).expect("a shell");
        drop(watcher.shell.stdin.take());
        assert_eq!(program.wait().expect("known").signal(), Some(9));
    }
}
