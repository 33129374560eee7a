//! The tree for a terminal: at most 100 columns, unless names leave no other way.

use topology::{Assignment, Branch, Device, Place, Snapshot};

use super::{Facts, cores, kind, name, printable};
use crate::table::bytes_text;

/// The widest line.
const COLUMNS_MAX: usize = 100;
/// However deep the tree is, a text gets so many columns.
const COLUMNS_MIN: usize = 30;

/// A thing with what hangs below it. All but the first of its lines are about it too, and stand indented.
struct Entry {
    lines: Vec<String>,
    below: Vec<Entry>,
}

pub(super) fn lines(facts: &Facts) -> Vec<String> {
    let mut lines = Vec::new();
    let tree = facts.snapshot.tree();
    let host = Entry { lines: vec![facts.title()], below: below(facts, &tree) };
    draw(&host, "", "", &mut lines);
    if !facts.host_ranks.is_empty() {
        lines.push(String::new());
    }
    for (rank, of) in facts.host_ranks.iter().enumerate() {
        let entry =
            Entry { lines: vec![format!("rank {rank}: {}", nics(facts, of)), cores(of)], below: Vec::new() };
        draw(&entry, "", "", &mut lines);
    }
    let remarks = facts.remarks();
    if !remarks.is_empty() {
        lines.push(String::new());
    }
    for remark in remarks {
        draw(&Entry { lines: vec![remark], below: Vec::new() }, "", "", &mut lines);
    }
    lines
}

fn branch(facts: &Facts, branch: &Branch<Device<'_>>) -> Entry {
    Entry { lines: vec![label(&facts.snapshot, branch.place)], below: below(facts, branch) }
}

/// GPUs, NICs of one kind together, and places.
fn below(facts: &Facts, at: &Branch<Device<'_>>) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut kinds: Vec<(String, Vec<String>)> = Vec::new();
    for &device in &at.devices {
        if let Device::Gpu(found) = device {
            entries.push(gpu(facts, found));
        } else if let Some(kind) = kind(device) {
            match kinds.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, names)) => names.push(name(device)),
                None => kinds.push((kind, vec![name(device)])),
            }
        }
    }
    kinds.sort();
    let line = |(kind, names): (String, Vec<String>)| format!("{kind}: {}", names.join(", "));
    entries.extend(kinds.into_iter().map(|kind| Entry { lines: vec![line(kind)], below: Vec::new() }));
    entries.extend(at.branches.iter().map(|below| branch(facts, below)));
    entries
}

fn gpu(facts: &Facts, gpu: &topology::Gpu) -> Entry {
    let model = gpu.model.as_ref().map_or_else(String::new, |model| format!(" {model}"));
    let mut lines = vec![format!("GPU {}{model}", gpu.pci.address)];
    if let Some(of) = facts.of(gpu.pci.address) {
        lines.push(nics(facts, of));
        lines.push(cores(of));
    }
    Entry { lines, below: Vec::new() }
}

/// The NICs of a GPU or a rank, and why these.
fn nics(facts: &Facts, of: &Assignment) -> String {
    if of.nics.is_empty() {
        return of.reason.to_string();
    }
    let shared = of.gpu.and_then(|_| of.nics.iter().filter_map(|nic| facts.gpus_of_nics.get(nic)).max());
    let shared = match shared {
        Some(gpus) if *gpus > 1 => format!("; shared by {gpus} GPUs"),
        _ => String::new(),
    };
    let nics = if of.nics.len() == 1 { "NIC" } else { "NICs" };
    format!("{nics} {} ({}{shared})", of.nics.join(", "), of.reason)
}

pub(super) fn label(snapshot: &Snapshot, place: Option<Place>) -> String {
    match place {
        None => "host".to_owned(),
        Some(Place::HostBridge(bridge)) => format!("host bridge {bridge}"),
        Some(Place::Bridge(bridge)) => format!("PCI switch {bridge}"),
        Some(Place::NumaNode(index)) => {
            let node = snapshot.numa_nodes.iter().find(|node| node.index == index);
            let cpus = node.and_then(|node| node.cpus.as_ref());
            let memory = node.and_then(|node| node.memory_bytes);
            let facts = [
                cpus.filter(|cpus| !cpus.is_empty()).map(|cpus| format!("CPUs {cpus}")),
                memory.map(|bytes| format!("{} of memory", bytes_text(bytes))),
            ];
            let facts: Vec<String> = facts.into_iter().flatten().collect();
            let colon = if facts.is_empty() { "" } else { ": " };
            format!("NUMA node {index}{colon}{}", facts.join(", "))
        }
    }
}

/// `first` stands before the first line, `rest` before all others.
fn draw(entry: &Entry, first: &str, rest: &str, lines: &mut Vec<String>) {
    let bar = if entry.below.is_empty() { "" } else { "│" };
    for (index, text) in entry.lines.iter().enumerate() {
        let indent = if index == 0 { 0 } else { 4 };
        let columns = COLUMNS_MAX.saturating_sub(rest.chars().count() + 7).max(COLUMNS_MIN);
        for (row, text) in wrapped(&printable(text), columns).iter().enumerate() {
            let start = if index == 0 && row == 0 { first.to_owned() } else { format!("{rest}{bar}") };
            let hang = if row == 0 { indent } else { indent + 2 };
            lines.push(format!("{start}{:hang$}{text}", ""));
        }
    }
    for (index, below) in entry.below.iter().enumerate() {
        let is_last = index + 1 == entry.below.len();
        let (tee, bar) = if is_last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        draw(below, &format!("{rest}{tee}"), &format!("{rest}{bar}"), lines);
    }
}

/// Lines of at most so many columns, broken at spaces where there are any.
fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut width = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > columns {
            lines.push(String::new());
            width = 0;
        }
        if let Some(line) = lines.last_mut() {
            if width > 0 {
                line.push(' ');
                width += 1;
            }
            line.push_str(word);
            width += length;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn wrapping_keeps_every_word(text in "[a-z]{1,12}( [a-z]{1,12}){0,20}", columns in 12..60usize) {
            let lines = wrapped(&text, columns);
            prop_assert_eq!(lines.join(" "), text);
            prop_assert!(lines.iter().all(|line| line.len() <= columns));
        }
    }
}
