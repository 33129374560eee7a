//! Prints what CUDA this machine has, and what its GPUs can do for a transfer. Runs anywhere.

use std::sync::Arc;

use gpu_mem::{Cuda, Device, Error, NicAccess, NicMemory, Observer, nvrtc_version};

fn main() {
    match Cuda::open() {
        Ok(cuda) => println!("driver: CUDA {}", cuda.driver_version()),
        Err(error) => println!("driver: {error}"),
    }
    match nvrtc_version() {
        Ok(version) => println!("NVRTC: {version}"),
        Err(error) => println!("NVRTC: {error}"),
    }
    let devices = Cuda::open().and_then(|cuda| cuda.devices()).unwrap_or_default();
    for device in &devices {
        if let Err(error) = describe(device) {
            println!("{device}: {error}");
        }
        for peer in devices.iter().filter(|peer| !peer.same_as(device)) {
            println!("  reaches GPU {}: {}", peer.index(), answer(device.can_access(peer)));
        }
    }
}

fn describe(device: &Device) -> Result<(), Error> {
    let (major, minor) = device.capability()?;
    let memory = device.memory()?;
    println!("{device}");
    println!("  compute capability {major}.{minor}, {} multiprocessors", device.multiprocessors()?);
    println!("  memory: {} of {} MiB free", memory.free >> 20, memory.total >> 20);
    println!(
        "  GPUDirect RDMA: {}, of mapped memory: {}",
        answer(device.has_rdma()),
        answer(device.has_rdma_with_vmm())
    );
    println!("  maps memory in chunks: {}", answer(device.has_vmm()));
    let buffer = Arc::new(device.alloc(2 << 20)?);
    match NicMemory::export(Arc::clone(&buffer), 0, 2 << 20)?.access() {
        NicAccess::DmaBuf(_) => println!("  dma-buf: yes"),
        NicAccess::Address(reason) => println!("  dma-buf: {reason}"),
    }
    if let Ok(segments) = device.segments(&[(buffer.address(), 1)]) {
        println!("  a buffer's segment: {:?}", segments.iter().next());
    }
    match device.flush_rdma_writes(Observer::Owner) {
        Ok(flushed) => println!("  flush of NICs' writes: {flushed:?}"),
        Err(error) => println!("  flush of NICs' writes: {error}"),
    }
    Ok(())
}

fn answer(answer: Result<bool, Error>) -> String {
    match answer {
        Ok(true) => "yes".into(),
        Ok(false) => "no".into(),
        Err(error) => error.to_string(),
    }
}
