//! Says which libfabric opens on this machine, and which of its providers have reliable datagram endpoints:
//! `cargo run -p libfabric-sys --example version`. Exits with 1 when none opens.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::process::ExitCode;
use std::ptr;

use libfabric_sys::{FI_EP_RDM, Library, Version};

fn main() -> ExitCode {
    let library = match Library::open() {
        Ok(library) => library,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    println!("path {}", library.path().display());
    println!("version {}", library.version());
    for provider in rdm_providers(&library) {
        println!("provider {provider}");
    }
    ExitCode::SUCCESS
}

fn rdm_providers(library: &Library) -> BTreeSet<String> {
    // A library refuses to speak an API newer than itself.
    let api = library.version().min(Version::BOUND);
    let mut providers = BTreeSet::new();
    let mut list = ptr::null_mut();
    // SAFETY: no hints, and the list goes to a local that outlives the call.
    if unsafe { library.fi_getinfo(api, ptr::null(), &raw mut list) } != 0 {
        return providers;
    }
    let mut next = list.cast_const();
    // SAFETY: null, or an entry of the list, which is freed only below.
    while let Some(info) = unsafe { next.as_ref() } {
        next = info.next;
        // SAFETY: null, or this entry's own attributes, alive as long as the list.
        let endpoint = unsafe { info.ep_attr.as_ref() };
        // SAFETY: as above.
        let fabric = unsafe { info.fabric_attr.as_ref() };
        if let (Some(endpoint), Some(fabric)) = (endpoint, fabric)
            && endpoint.type_ == FI_EP_RDM
            && !fabric.prov_name.is_null()
        {
            // SAFETY: not null, and the library ends its texts.
            let name = unsafe { CStr::from_ptr(fabric.prov_name) };
            providers.insert(name.to_string_lossy().into_owned());
        }
    }
    // SAFETY: the list is this library's, and nothing refers to it any more.
    unsafe { library.fi_freeinfo(list) };
    providers
}
