//! Prints this host, or another from a copied tree or a dump, as JSON, and on standard error what serves each GPU:
//! `cargo run -p topology --example snapshot [FOLDER or FILE]`.

use std::path::Path;

use topology::{Roots, Snapshot, pair};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let snapshot = match std::env::args_os().nth(1) {
        Some(path) => Snapshot::load(Path::new(&path))?,
        None => Snapshot::read(&Roots::default())?,
    };
    println!("{}", serde_json::to_string_pretty(&snapshot)?);
    let pairing = pair(&snapshot);
    for of in &pairing.gpus {
        eprintln!("{:?}: {} ({}), cores {}", of.gpu, of.nics.join(" "), of.reason, of.cores);
    }
    for note in &pairing.notes {
        eprintln!("{note}");
    }
    Ok(())
}
