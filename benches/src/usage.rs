//! What the kernel says of a running process. Linux alone.

use std::fs;
use std::io;

/// What a process holds and has used so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Usage {
    /// Memory that is resident, to the page. Counted by walking the page table: the sums in `status` and `statm` may lag
    /// behind by some pages per core.
    pub(crate) resident_bytes: u64,
    /// Open file descriptors.
    pub(crate) files: u64,
    pub(crate) threads: u64,
    pub(crate) cpu_seconds: f64,
}

impl Usage {
    /// # Errors
    ///
    /// If the process has ended, or belongs to another user.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let count =
            |what: &str| Ok::<_, io::Error>(fs::read_dir(format!("/proc/{pid}/{what}"))?.count() as u64);
        let missing = |what: &str| io::Error::other(format!("/proc/{pid}/{what} does not say it"));
        let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let resident = memory.lines().find_map(|line| line.strip_prefix("Rss:"));
        let kib = resident.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        Ok(Self {
            resident_bytes: kib.ok_or_else(|| missing("smaps_rollup"))? << 10,
            files: count("fd")?,
            threads: count("task")?,
            cpu_seconds: cpu_seconds(pid).ok_or_else(|| missing("stat"))?,
        })
    }
}

/// Seconds of CPU time that a process has used so far; `None` where the kernel does not say.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may have spaces: utime and stime are the 12th and 13th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_a_process_takes_is_seen() {
        // Takes a descriptor and 4 MB when it is told to.
        let script =
            r"echo; read go; exec 9</dev/null; x=$(head -c 4000000 /dev/zero | tr '\0' x); echo; read go";
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.next().unwrap().unwrap();
        let before = Usage::of(child.id()).unwrap();
        writeln!(child.stdin.as_mut().unwrap()).unwrap();
        lines.next().unwrap().unwrap();
        let after = Usage::of(child.id()).unwrap();
        assert!(after.resident_bytes >= before.resident_bytes + 4_000_000, "{before:?} {after:?}");
        assert_eq!((after.files, after.threads), (before.files + 1, 1));
        assert!(after.cpu_seconds >= before.cpu_seconds);
        writeln!(child.stdin.as_mut().unwrap()).unwrap();
        assert!(child.wait().unwrap().success());
        assert!(Usage::of(child.id()).is_err());
    }
}
