//! What this machine's libfabric offers, and one write between two rails of this process.
//!
//! `cargo run -p efa-core --example ping`

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use efa_core::{Completion, Hints, LeaseMut, Library, Provider, Rail, RailConfig, Write};

/// Longer than any loopback needs to connect.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match ping() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn ping() -> Result<(), Box<dyn Error>> {
    let library = Library::open()?;
    println!("libfabric {} from {}", library.version(), library.path().display());
    for provider in Provider::ALL {
        match library.infos(&Hints::new(provider)) {
            Ok(infos) => infos.iter().for_each(|info| println!("  {info}")),
            Err(error) => println!("  {provider}: {error}"),
        }
    }

    // Two rails on loopback. In real life they live in two processes, which tell each other address and region.
    let hints = Hints { provider: library.tcp_provider(), ..Hints::default() };
    let info = library.infos(&hints)?.swap_remove(0);
    let mut receiver = Rail::open(&info, &RailConfig::for_info(&info))?;
    let mut sender = Rail::open(&info, &RailConfig::for_info(&info))?;
    println!("{} -> {}", sender.name(), receiver.name());

    let target = LeaseMut::zeroed(4096)?.expose();
    let (target_region, remote) = receiver.expose(&target)?;

    let mut message = LeaseMut::zeroed(5)?;
    message.bytes_mut().copy_from_slice(b"hello");
    let region = sender.register(message.memory())?;
    let to = sender.insert_peer(receiver.address())?;
    let mut write = Some(Write {
        from: message.freeze(),
        region,
        to,
        remote: remote.at(100, 5)?,
        immediate: Some(7),
        delivery_complete: true,
        token: 1,
    });

    let start = Instant::now();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    while ours.is_empty() || theirs.is_empty() {
        if let Some(again) = write.take() {
            // The first posts are refused while the rails connect.
            write = sender.write(again).err().map(|rejected| rejected.op);
        }
        sender.poll(&mut ours)?;
        receiver.poll(&mut theirs)?;
        if start.elapsed() > PATIENCE {
            return Err(format!("nothing arrived within {PATIENCE:?}").into());
        }
    }
    if let Some(Completion::Op { result, .. }) = ours.pop() {
        println!("sender: {} bytes written", result?.bytes);
    }
    let mut arrived = [0; 5];
    target.read(100, &mut arrived)?;
    println!("receiver: {:?} says {:?}", theirs, String::from_utf8_lossy(&arrived));

    println!("region: {:?}", receiver.close_region(target_region)?);
    receiver.close()?;
    println!("target reclaimed: {}", target.reclaim().is_ok());
    Ok(())
}
