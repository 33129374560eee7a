//! Taking labs down: by name, all of them, and those whose owner was killed.
//!
//! Nothing of a lab whose owner lives is touched, and no namespace but those that carry the prefix and a side.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::occupants::OpenNamespace;
use crate::owner::{self, Owner, TAKE_MAX};
use crate::{LabError, PREFIX, Side, namespace, options, script, shell};

/// Where iproute2 keeps the names of namespaces.
const NAMESPACES: &str = "/run/netns";

/// How often namespaces without a name are looked at, at most. Who is still seen then has been killed by look after look
/// and only takes long to end.
const LAST_LOOKS_MAX: u32 = 20;

/// How long to wait before each: time for one who was just opening the file to have it, on a busy machine too.
const LAST_LOOKS_APART: Duration = Duration::from_millis(5);

/// How a lab stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabState {
    /// A living process has it (its id, where that could be read), or is about to remove it.
    InUse(Option<u32>),
    /// Left standing on purpose.
    Kept,
    /// Its owner was killed; the next [`crate::Lab::up`] or [`down`] removes it.
    LeftOver,
}

/// The labs of this machine by name, and how they stand.
pub fn list() -> Vec<(String, LabState)> {
    // A namespace without a file has no owner.
    let state = |name: String| {
        let state = owner::look(&name).or_else(|| stands(&name).then_some(LabState::LeftOver))?;
        Some((name, state))
    };
    names().into_iter().filter_map(state).collect()
}

/// Takes down the lab of this name, or every lab on this machine whose owner does not live; the names of those that were
/// there. What still runs in them, or is about to, is killed.
///
/// # Errors
///
/// When the lab that was named is in use, and when `ip` fails; with several labs the rest is removed all the same.
pub fn down(name: Option<&str>) -> Result<Vec<String>, LabError> {
    match name {
        Some(name) => {
            options::check_name(name)?;
            let there = names().iter().any(|found| found == name);
            if !there {
                return Ok(Vec::new());
            }
            remove(name, Owner::take(name, TAKE_MAX)?)?;
            Ok(vec![name.to_owned()])
        }
        None => down_where(|_| true),
    }
}

fn down_where(wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, LabError> {
    let mut removed = Vec::new();
    let mut failed = None;
    for name in names().into_iter().filter(|name| wanted(name)) {
        match Owner::take(&name, Duration::ZERO).and_then(|owner| remove(&name, owner)) {
            Ok(()) => removed.push(name),
            Err(LabError::InUse { .. }) => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(removed), Err)
}

/// Removes what killed owners left. What cannot be removed does not keep a new lab from being built: [`down`] tells.
pub(crate) fn sweep() {
    drop(down_where(|name| owner::look(name) != Some(LabState::Kept)));
}

/// Takes a lab down and gives its name back.
pub(crate) fn remove(name: &str, owner: Owner) -> Result<(), LabError> {
    // If something stays, so does the file, and the lab is a left-over.
    take_apart(name)?;
    owner.remove()
}

/// Removes processes, NICs and namespaces of a name that the caller has taken. Nothing may be there.
pub(crate) fn take_apart(name: &str) -> Result<(), LabError> {
    let mut namespaces = Vec::new();
    for namespace in Side::ALL.map(|side| namespace(name, side)) {
        let opened = OpenNamespace::open(&Path::new(NAMESPACES).join(&namespace))?;
        namespaces.extend(opened.map(|opened| (namespace, opened)));
    }
    kill_all(&namespaces)?;
    // A closing connection can keep a namespace without a name alive for minutes; it must not keep its NICs.
    for (namespace, _) in &namespaces {
        drop(shell::run("ip", &["-n", namespace, "link", "del", "group", script::GROUP]));
    }
    for (namespace, _) in &namespaces {
        shell::run("ip", &["netns", "del", namespace])?;
    }
    // Nobody can open them any more. Who did after the first look has entered by now, or is about to.
    for _ in 0..LAST_LOOKS_MAX {
        thread::sleep(LAST_LOOKS_APART);
        if !kill_all(&namespaces)? {
            break;
        }
    }
    Ok(())
}

/// Kills who is in these namespaces or about to enter them; whether there was anybody.
fn kill_all(namespaces: &[(String, OpenNamespace)]) -> Result<bool, LabError> {
    namespaces.iter().try_fold(false, |any, (_, namespace)| Ok(namespace.kill_all()? || any))
}

/// Whether anything of this name is there to be seen.
pub(crate) fn stands(name: &str) -> bool {
    Side::ALL.iter().any(|side| exists(&namespace(name, *side)))
}

fn exists(namespace: &str) -> bool {
    Path::new(NAMESPACES).join(namespace).exists()
}

/// The names of all labs, by their files and by their namespaces, each once.
fn names() -> Vec<String> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let of_namespace = |namespace: String| {
        let name = namespace.strip_prefix(PREFIX)?;
        Side::ALL.iter().find_map(|side| name.strip_suffix(side.suffix())).map(str::to_owned)
    };
    let mut names: Vec<String> =
        entries.filter_map(|entry| of_namespace(entry.file_name().into_string().ok()?)).collect();
    names.extend(owner::names());
    names.retain(|name| options::check_name(name).is_ok());
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Lab, LabOptions};

    /// Of all labs only those of this test: others may stand, on this machine or beside this test.
    #[test]
    fn all_are_taken_down_but_those_in_use() {
        if let Err(why) = crate::check() {
            println!("skipped: needs root and iproute2: {why}");
            return;
        }
        let mark = format!("all-{}-", std::process::id());
        let options = LabOptions { links: 1, ..LabOptions::default() };
        let up = |name: &str| Lab::up(&format!("{mark}{name}"), &options).unwrap();
        let used = up("used");
        up("kept").keep().unwrap();
        let states: Vec<_> = list().into_iter().filter(|(name, _)| name.starts_with(&mark)).collect();
        let expected = [
            (format!("{mark}kept"), LabState::Kept),
            (format!("{mark}used"), LabState::InUse(Some(std::process::id()))),
        ];
        assert_eq!(states, expected);
        let ours = |name: &str| name.starts_with(&mark);
        assert_eq!(down_where(ours).unwrap(), [format!("{mark}kept")]);
        assert!(stands(used.name()) && !stands(&format!("{mark}kept")));
        drop(used);
        assert!(!names().iter().any(|name| ours(name)));
    }
}
