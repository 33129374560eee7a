//! What Slurm says of where rank 0 is.

use super::{LaunchError, PORT_DEFAULT, Reader};

/// Ports that jobs are spread over, so that two jobs on one host rarely want the same.
const PORTS: u32 = 4096;

/// The first host of the step, where Slurm puts task 0 unless it is asked for something odd. The launch node comes last:
/// it is where srun was called, which may run no task.
pub(super) fn first_host(reader: &mut Reader) -> Result<String, LaunchError> {
    for variable in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
        if let Some(value) = reader.text(variable) {
            return first_of(&value).ok_or_else(|| LaunchError::Malformed {
                variable: variable.to_owned(),
                value,
                what: "list of hosts",
            });
        }
    }
    reader.text("SLURM_LAUNCH_NODE_IPADDR").ok_or(LaunchError::Missing {
        present: "SLURM_PROCID".into(),
        missing: "SLURM_JOB_NODELIST",
        hint: "srun sets it; or give --address HOST",
    })
}

/// A port that every rank of the job works out alike.
pub(super) fn port(reader: &mut Reader) -> Result<u16, LaunchError> {
    let job = reader.number("SLURM_JOB_ID")?.unwrap_or(0);
    Ok(PORT_DEFAULT.saturating_add((job % PORTS) as u16))
}

/// The first host of Slurm's notation: `gpu[03-07,9]-ib,login1` begins with `gpu03-ib`.
pub(super) fn first_of(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    while let Some(at) = rest.find(['[', ',']) {
        let (before, from) = rest.split_at(at);
        host += before;
        let Some(inside) = from.strip_prefix('[') else {
            rest = "";
            break;
        };
        let (numbers, after) = inside.split_once(']')?;
        let first = numbers.split([',', '-']).next()?;
        if first.is_empty() || !first.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        host += first;
        rest = after;
    }
    host += rest;
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b':');
    (!host.is_empty() && host.bytes().all(sound)).then_some(host)
}
