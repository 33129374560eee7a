//! The yardstick: a plain loop of libfabric writes over TCP, with nothing of weightsync in it but the bindings.
//!
//! One process walks a large source buffer and writes it, chunk by chunk, to the same offsets of a target in another
//! process, with a fixed number of writes in flight. Both buffers are real memory and larger than any cache, as in a real
//! push. It prints one line of JSON: bytes, seconds, GB/s (10^9 bytes). Connecting and page faults are not counted. With
//! `--ask` it does so once for every line of its standard input, and keeps its memory between: a process that ends gives
//! gigabytes back to the kernel, and whatever is measured next pays for that.
//!
//! `cargo run --release -p libfabric-sys --example plain_loop -- --total-bytes 16G`
//!
//! Without a role it starts its own server. On two hosts, or in two network namespaces, run `plain_loop server` on one,
//! which prints a line, and `plain_loop client <that line>` on the other; give both the same `--region-bytes`, and
//! `--source` where the default of 127.0.0.1 does not serve.

use std::error::Error;
use std::ffi::{CString, c_void};
use std::io::{BufRead, BufReader, Read as _, Write};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use libfabric_sys as sys;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long the server's queue sleeps at most before it looks whether its client has gone, in milliseconds.
const SERVER_NAP_MS: i32 = 100;

/// Entries read from a queue at a time.
const ENTRIES: usize = 32;

const EMPTY: sys::fi_cq_data_entry =
    sys::fi_cq_data_entry { op_context: ptr::null_mut(), flags: 0, len: 0, buf: ptr::null_mut(), data: 0 };

/// More than any `tcp` address has.
const ADDRESS_BYTES: usize = 64;

#[derive(Clone)]
struct Options {
    role: Option<String>,
    /// What the server printed; for the client.
    greeting: Option<String>,
    total_bytes: usize,
    region_bytes: usize,
    chunk_bytes: usize,
    window: usize,
    source: Ipv4Addr,
    /// The server spins on its queue during a round instead of blocking.
    spin: bool,
    /// A round for every line of standard input, instead of one; the server spins if the line says `spin`.
    ask: bool,
}

fn main() -> Outcome<()> {
    let options = parse(std::env::args().skip(1))?;
    match options.role.as_deref() {
        Some("server") => serve(&options),
        Some("client") => {
            write_all(&options, options.greeting.as_deref().unwrap_or_default(), &mut std::io::sink())
        }
        _ => with_own_server(&options),
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Outcome<Options> {
    let mut options = Options {
        role: None,
        greeting: None,
        total_bytes: 16 << 30,
        region_bytes: 4 << 30,
        chunk_bytes: 1 << 20,
        window: 16,
        source: Ipv4Addr::LOCALHOST,
        spin: false,
        ask: false,
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--total-bytes" => options.total_bytes = bytes(&value()?)?,
            "--region-bytes" => options.region_bytes = bytes(&value()?)?,
            "--chunk-bytes" => options.chunk_bytes = bytes(&value()?)?,
            "--window" => options.window = value()?.parse()?,
            "--source" => options.source = value()?.parse()?,
            "--spin" => options.spin = true,
            "--ask" => options.ask = true,
            "server" | "client" if options.role.is_none() => options.role = Some(argument),
            _ if options.role.as_deref() == Some("client") => options.greeting = Some(argument),
            _ => return Err(format!("what is '{argument}'?").into()),
        }
    }
    let Options { total_bytes, region_bytes, chunk_bytes, window, .. } = options;
    if chunk_bytes == 0 || window == 0 || chunk_bytes > region_bytes || total_bytes < chunk_bytes {
        return Err("need window > 0 and 0 < chunk <= region, chunk <= total".into());
    }
    Ok(options)
}

/// A number of bytes, with K, M or G for powers of 1024.
fn bytes(text: &str) -> Outcome<usize> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let count: usize = digits.parse()?;
    count.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large").into())
}

/// Runs the server in a process of its own, and the client in this one.
fn with_own_server(options: &Options) -> Outcome<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["server", "--source", &options.source.to_string()]);
    command.args(["--region-bytes", &options.region_bytes.to_string()]);
    let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut greeting = String::new();
    BufReader::new(server.stdout.take().ok_or("no pipe")?).read_line(&mut greeting)?;
    let mut tell = server.stdin.take().ok_or("no pipe")?;
    let result = write_all(options, greeting.trim(), &mut tell);
    drop(tell);
    let status = server.wait()?;
    result?;
    if status.success() { Ok(()) } else { Err(format!("the server ended with {status}").into()) }
}

/// What the server hears on its standard input: spin on the queue from now on, or sleep on it.
const SPIN: u8 = b'+';
const SLEEP: u8 = b'-';

/// Exposes a target and makes progress until standard input ends.
fn serve(options: &Options) -> Outcome<()> {
    let rail = Rail::open(options, true)?;
    let target = committed(options.region_bytes)?;
    let key = random_key()?;
    let mr = rail.register(target, options.region_bytes, sys::FI_REMOTE_WRITE, key)?;
    // SAFETY: the registration is open.
    let key = unsafe { sys::fi_mr_key(mr) };
    println!("{}:{key:x}", rail.address()?.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    std::io::stdout().flush()?;

    static CLIENT_GONE: AtomicBool = AtomicBool::new(false);
    static SPINS: AtomicBool = AtomicBool::new(false);
    SPINS.store(options.spin, Ordering::Relaxed);
    std::thread::spawn(|| {
        for word in std::io::stdin().lock().bytes().map_while(Result::ok) {
            SPINS.store(word == SPIN, Ordering::Relaxed);
        }
        CLIENT_GONE.store(true, Ordering::Relaxed);
    });
    let mut entries = [EMPTY; ENTRIES];
    while !CLIENT_GONE.load(Ordering::Relaxed) {
        if SPINS.load(Ordering::Relaxed) {
            rail.completions(&mut entries)?;
        } else {
            // SAFETY: the queue is open, and the room has so many entries.
            let read =
                unsafe { sys::fi_cq_sread(rail.cq, entries.as_mut_ptr().cast(), ENTRIES, SERVER_NAP_MS) };
            count_of(&rail.library, "fi_cq_sread", read)?;
        }
    }
    // The process ends here, and with it everything that was opened.
    Ok(())
}

/// Connects to the server, then writes the source to the target and prints how long it took: once, or once per line of
/// standard input. The server hears on `tell` how to wait.
fn write_all(options: &Options, greeting: &str, tell: &mut dyn Write) -> Outcome<()> {
    let (address, key) = greeting.split_once(':').ok_or("client needs the line that the server printed")?;
    let key = u64::from_str_radix(key, 16)?;
    let rail = Rail::open(options, false)?;
    let peer = rail.insert(address)?;
    let source = committed(options.region_bytes)?;
    let mut contexts = vec![sys::fi_context2 { internal: [ptr::null_mut(); 8] }; options.window];
    let mut round = |bytes| write_region(&rail, peer, source, bytes, key, options, &mut contexts);
    // The first write connects, and is not counted.
    round(options.chunk_bytes)?;
    let report = |seconds: f64| {
        let bytes = options.total_bytes / options.chunk_bytes * options.chunk_bytes;
        let gb_per_s = bytes as f64 / seconds / 1e9;
        println!("{{\"bytes\": {bytes}, \"seconds\": {seconds:.6}, \"gb_per_s\": {gb_per_s:.3}}}");
        std::io::stdout().flush()
    };
    let mut server = |spins| tell.write_all(&[if spins { SPIN } else { SLEEP }]).and_then(|()| tell.flush());
    if !options.ask {
        server(options.spin)?;
        return Ok(report(round(options.total_bytes)?)?);
    }
    for line in std::io::stdin().lines() {
        server(line? == "spin")?;
        report(round(options.total_bytes)?)?;
        server(false)?;
    }
    Ok(())
}

/// Writes so many bytes, walking the region as often as that takes; how many seconds.
fn write_region(
    rail: &Rail,
    peer: sys::fi_addr_t,
    source: *mut u8,
    bytes: usize,
    key: u64,
    options: &Options,
    contexts: &mut [sys::fi_context2],
) -> Outcome<f64> {
    let chunks_in_region = options.region_bytes / options.chunk_bytes;
    let chunks = bytes / options.chunk_bytes;
    let mut entries = [EMPTY; ENTRIES];
    let mut free: Vec<*mut sys::fi_context2> = contexts.iter_mut().map(ptr::from_mut).collect();
    let (mut posted, mut completed) = (0, 0);
    let start = Instant::now();
    while completed < chunks {
        while posted < chunks
            && let Some(context) = free.pop()
        {
            let offset = posted % chunks_in_region * options.chunk_bytes;
            let code =
                rail.write(peer, source.wrapping_add(offset), offset, options.chunk_bytes, key, context);
            match code {
                0 => posted += 1,
                _ => {
                    free.push(context);
                    if code != -(sys::FI_EAGAIN as isize) {
                        return Err(format!("fi_writemsg: {}", rail.library.strerror(code as i32)).into());
                    }
                    break;
                }
            }
        }
        let count = rail.completions(&mut entries)?;
        free.extend(entries[..count].iter().map(|entry| entry.op_context.cast()));
        completed += count;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Anonymous memory with every page present.
fn committed(len: usize) -> Outcome<*mut u8> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice; it lives until the process ends.
    let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: advice on the mapping made above; whether it is taken does not matter.
    unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
    // SAFETY: as long as the mapping made above, which nothing else knows yet.
    unsafe { ptr::write_bytes(base.cast::<u8>(), 1, len) };
    Ok(base.cast())
}

fn random_key() -> Outcome<u64> {
    let mut key = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut key)?;
    Ok(u64::from_ne_bytes(key) >> 1)
}

/// One endpoint and what it is bound to. Nothing is closed: the process ends first.
struct Rail {
    library: sys::Library,
    domain: *mut sys::fid_domain,
    cq: *mut sys::fid_cq,
    av: *mut sys::fid_av,
    ep: *mut sys::fid_ep,
}

impl Rail {
    fn open(options: &Options, blocking: bool) -> Outcome<Self> {
        let library = sys::Library::open()?;
        // SAFETY: null asks for an empty info; it lives until the process ends, like everything here.
        let hints = unsafe { library.fi_dupinfo(ptr::null()) };
        // SAFETY: an info of our own, or null.
        let hints = unsafe { hints.as_mut() }.ok_or("no memory for hints")?;
        hints.caps = sys::FI_MSG | sys::FI_RMA;
        hints.mode = sys::FI_CONTEXT | sys::FI_CONTEXT2;
        hints.addr_format = sys::FI_SOCKADDR_IN;
        let source = Box::new(libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(options.source.octets()) },
            sin_zero: [0; 8],
        });
        hints.src_addr = Box::into_raw(source).cast();
        hints.src_addrlen = size_of::<libc::sockaddr_in>();
        // SAFETY: an empty info has its parts.
        unsafe { (*hints.ep_attr).type_ = sys::FI_EP_RDM };
        // SAFETY: as above.
        unsafe { (*hints.domain_attr).threading = sys::FI_THREAD_DOMAIN };
        // SAFETY: as above.
        unsafe { (*hints.fabric_attr).prov_name = CString::new("tcp")?.into_raw() };

        let api = library.version().min(sys::Version::BOUND);
        let mut info = ptr::null_mut();
        // SAFETY: hints of this library.
        let code = unsafe { library.fi_getinfo(api, hints, &raw mut info) };
        check(&library, "fi_getinfo (plain tcp needs libfabric 1.18)", code)?;
        // SAFETY: the call succeeded, so the list has a first member with all its parts.
        let fabric_attr = unsafe { (*info).fabric_attr };
        let mut fabric = ptr::null_mut();
        // SAFETY: attributes of an info of this library.
        let code = unsafe { library.fi_fabric(fabric_attr, &raw mut fabric) };
        check(&library, "fi_fabric", code)?;
        let mut domain = ptr::null_mut();
        // SAFETY: an open fabric and its own info.
        let code = unsafe { sys::fi_domain(fabric, info, &raw mut domain) };
        check(&library, "fi_domain", code)?;
        let mut cq_attr = sys::fi_cq_attr {
            size: 2 * options.window.max(ENTRIES),
            flags: 0,
            format: sys::FI_CQ_FORMAT_DATA,
            wait_obj: if blocking { sys::FI_WAIT_FD } else { sys::FI_WAIT_NONE },
            signaling_vector: 0,
            wait_cond: 0,
            wait_set: ptr::null_mut(),
        };
        let mut cq = ptr::null_mut();
        // SAFETY: an open domain.
        let code = unsafe { sys::fi_cq_open(domain, &raw mut cq_attr, &raw mut cq) };
        check(&library, "fi_cq_open", code)?;
        let mut av_attr = sys::fi_av_attr {
            type_: sys::FI_AV_UNSPEC,
            rx_ctx_bits: 0,
            count: 0,
            ep_per_node: 0,
            name: ptr::null(),
            map_addr: ptr::null_mut(),
            flags: 0,
        };
        let mut av = ptr::null_mut();
        // SAFETY: an open domain.
        let code = unsafe { sys::fi_av_open(domain, &raw mut av_attr, &raw mut av) };
        check(&library, "fi_av_open", code)?;
        let mut ep = ptr::null_mut();
        // SAFETY: an open domain and its own info.
        let code = unsafe { sys::fi_endpoint(domain, info, &raw mut ep) };
        check(&library, "fi_endpoint", code)?;
        // SAFETY: an open endpoint and queue of one domain.
        let code = unsafe { sys::fi_ep_bind(ep, cq.cast(), sys::FI_TRANSMIT | sys::FI_RECV) };
        check(&library, "fi_ep_bind(cq)", code)?;
        // SAFETY: an open endpoint and vector of one domain.
        let code = unsafe { sys::fi_ep_bind(ep, av.cast(), 0) };
        check(&library, "fi_ep_bind(av)", code)?;
        // SAFETY: bound to all it needs.
        let code = unsafe { sys::fi_enable(ep) };
        check(&library, "fi_enable", code)?;
        Ok(Self { library, domain, cq, av, ep })
    }

    fn address(&self) -> Outcome<Vec<u8>> {
        let mut address = vec![0_u8; ADDRESS_BYTES];
        let mut len = address.len();
        // SAFETY: the endpoint is enabled, and the room has `len` bytes.
        let code = unsafe { sys::fi_getname(self.ep, address.as_mut_ptr().cast(), &raw mut len) };
        check(&self.library, "fi_getname", code)?;
        address.truncate(len);
        Ok(address)
    }

    fn insert(&self, hex: &str) -> Outcome<sys::fi_addr_t> {
        let mut address = [0_u8; ADDRESS_BYTES];
        for (index, byte) in address.iter_mut().enumerate().take(hex.len() / 2) {
            *byte = u8::from_str_radix(&hex[2 * index..2 * index + 2], 16)?;
        }
        let mut peer = sys::FI_ADDR_NOTAVAIL;
        // SAFETY: the vector is open, and the address is padded beyond what a socket address has.
        let count = unsafe { sys::fi_av_insert(self.av, address.as_ptr().cast(), 1, &raw mut peer, 0) };
        if count == 1 { Ok(peer) } else { Err(format!("fi_av_insert answered {count}").into()) }
    }

    fn register(&self, base: *mut u8, len: usize, access: u64, key: u64) -> Outcome<*mut sys::fid_mr> {
        let iov = sys::iovec { iov_base: base.cast(), iov_len: len };
        let attr = sys::fi_mr_attr {
            what: sys::fi_mr_what { mr_iov: &raw const iov },
            iov_count: 1,
            access,
            offset: 0,
            requested_key: key,
            context: ptr::null_mut(),
            auth_key_size: 0,
            auth_key: ptr::null_mut(),
            iface: sys::FI_HMEM_SYSTEM,
            device: sys::fi_mr_device { reserved: 0 },
            hmem_data: ptr::null_mut(),
            page_size: 0,
            base_mr: ptr::null(),
            sub_mr_cnt: 0,
        };
        let mut mr = ptr::null_mut();
        // SAFETY: the domain is open, and the range stays mapped until the process ends.
        let code = unsafe { sys::fi_mr_regattr(self.domain, &raw const attr, 0, &raw mut mr) };
        check(&self.library, "fi_mr_regattr", code)?;
        Ok(mr)
    }

    /// Posts one write to an offset of the peer's region: hints without FI_MR_VIRT_ADDR make addresses offsets.
    fn write(
        &self,
        peer: sys::fi_addr_t,
        from: *mut u8,
        offset: usize,
        len: usize,
        key: u64,
        context: *mut sys::fi_context2,
    ) -> isize {
        let iov = sys::iovec { iov_base: from.cast(), iov_len: len };
        let rma_iov = sys::fi_rma_iov { addr: offset as u64, len, key };
        // Hints without FI_MR_LOCAL make descriptors null.
        let mut desc: *mut c_void = ptr::null_mut();
        let message = sys::fi_msg_rma {
            msg_iov: &raw const iov,
            desc: &raw mut desc,
            iov_count: 1,
            addr: peer,
            rma_iov: &raw const rma_iov,
            rma_iov_count: 1,
            context: context.cast(),
            data: 0,
        };
        let flags = sys::FI_COMPLETION | sys::FI_DELIVERY_COMPLETE;
        // SAFETY: the endpoint is open; source and contexts live until the process ends or `write_all` has seen every
        // completion.
        unsafe { sys::fi_writemsg(self.ep, &raw const message, flags) }
    }

    fn completions(&self, entries: &mut [sys::fi_cq_data_entry; ENTRIES]) -> Outcome<usize> {
        // SAFETY: the queue is open, and the room has so many entries.
        let read = unsafe { sys::fi_cq_read(self.cq, entries.as_mut_ptr().cast(), ENTRIES) };
        count_of(&self.library, "fi_cq_read", read)
    }
}

fn check(library: &sys::Library, call: &str, code: i32) -> Outcome<()> {
    if code == 0 { Ok(()) } else { Err(format!("{call}: {}", library.strerror(code)).into()) }
}

/// How many entries a queue gave; none is not an error.
fn count_of(library: &sys::Library, call: &str, read: isize) -> Outcome<usize> {
    let code = i32::try_from(read)?;
    match usize::try_from(read) {
        Ok(count) => Ok(count),
        Err(_) if matches!(-code, sys::FI_EAGAIN | sys::FI_EINTR) => Ok(0),
        Err(_) => Err(format!("{call}: {}", library.strerror(code)).into()),
    }
}
