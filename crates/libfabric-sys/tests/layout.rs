//! Every structure and constant that is bound, against the C headers: a C program prints what the compiler makes of
//! them. Needs a C compiler and libfabric's headers, of 2.1 or newer for the tails that 1.17 lacks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use libfabric_sys as sys;

/// What one line of the C program is about, the C expression of its values, and the values here.
struct Line {
    what: String,
    c_values: [String; 2],
    values: [u64; 2],
}

fn field_bytes<S, F>(_: impl Fn(&S) -> &F) -> u64 {
    size_of::<F>() as u64
}

macro_rules! structs {
    ($($name:ident $(($size:ident))? { $($field:ident $(= $c_field:literal)?),* $(,)? })*) => {{
        let mut lines = Vec::new();
        $(
            let c_struct = concat!("struct ", stringify!($name));
            structs!(@size lines, c_struct, $name $(, $size)?);
            $(
                #[allow(unused_mut, unused_assignments)]
                let mut c_field = stringify!($field);
                $( c_field = $c_field; )?
                lines.push(Line {
                    what: format!("{}.{}", stringify!($name), c_field),
                    c_values: [
                        format!("offsetof({c_struct}, {c_field})"),
                        format!("sizeof((({c_struct} *) 0)->{c_field})"),
                    ],
                    values: [
                        std::mem::offset_of!(sys::$name, $field) as u64,
                        field_bytes(|whole: &sys::$name| &whole.$field),
                    ],
                });
            )*
        )*
        lines
    }};
    // The library allocates it, and we bind only its beginning.
    (@size $lines:ident, $c_struct:ident, $name:ident, prefix) => {};
    (@size $lines:ident, $c_struct:ident, $name:ident) => {
        $lines.push(Line {
            what: stringify!($name).to_owned(),
            c_values: [format!("sizeof({})", $c_struct), format!("_Alignof({})", $c_struct)],
            values: [size_of::<sys::$name>() as u64, align_of::<sys::$name>() as u64],
        });
    };
}

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        vec![$( Line {
            what: stringify!($name).to_owned(),
            c_values: [format!("(unsigned long long) {}", stringify!($name)), "0".to_owned()],
            values: [i128::from(sys::$name) as u64, 0],
        } ),*]
    };
}

fn struct_lines() -> Vec<Line> {
    structs! {
        fi_tx_attr {
            caps, mode, op_flags, msg_order, comp_order, inject_size, size, iov_limit, rma_iov_limit, tclass,
        }
        fi_rx_attr { caps, mode, op_flags, msg_order, comp_order, total_buffered_recv, size, iov_limit }
        fi_ep_attr {
            type_ = "type", protocol, protocol_version, max_msg_size, msg_prefix_size, max_order_raw_size,
            max_order_war_size, max_order_waw_size, mem_tag_format, tx_ctx_cnt, rx_ctx_cnt, auth_key_size, auth_key,
        }
        fi_domain_attr (prefix) {
            domain, name, threading, control_progress, data_progress, resource_mgmt, av_type, mr_mode, mr_key_size,
            cq_data_size, cq_cnt, ep_cnt, tx_ctx_cnt, rx_ctx_cnt, max_ep_tx_ctx, max_ep_rx_ctx, max_ep_stx_ctx,
            max_ep_srx_ctx, cntr_cnt, mr_iov_limit, caps, mode, auth_key, auth_key_size, max_err_data, mr_cnt, tclass,
        }
        fi_fabric_attr { fabric, name, prov_name, prov_version, api_version }
        fi_info {
            next, caps, mode, addr_format, src_addrlen, dest_addrlen, src_addr, dest_addr, handle, tx_attr, rx_attr,
            ep_attr, domain_attr, fabric_attr, nic,
        }
        fi_device_attr { name, device_id, device_version, vendor_id, driver, firmware }
        fi_pci_attr { domain_id, bus_id, device_id, function_id }
        fi_bus_attr { bus_type, pci = "attr.pci" }
        fi_link_attr { address, mtu, speed, state, network_type }
        fid_nic { fid, device_attr, bus_attr, link_attr, prov_attr }
        fid { fclass, context, ops }
        fi_ops { size, close, bind, control, ops_open, tostr, ops_set }
        fid_fabric { fid, ops, api_version }
        fi_ops_fabric { size, domain, passive_ep, eq_open, wait_open, trywait, domain2 }
        fid_domain { fid, ops, mr }
        fi_ops_domain {
            size, av_open, cq_open, endpoint, scalable_ep, cntr_open, poll_open, stx_ctx, srx_ctx, query_atomic,
            query_collective, endpoint2,
        }
        fi_ops_mr { size, reg, regv, regattr }
        fid_mr { fid, mem_desc, key }
        fi_mr_dmabuf { fd, offset, len, base_addr }
        fi_mr_attr {
            what = "mr_iov", iov_count, access, offset, requested_key, context, auth_key_size, auth_key, iface, device,
            hmem_data, page_size, base_mr, sub_mr_cnt,
        }
        fi_av_attr { type_ = "type", rx_ctx_bits, count, ep_per_node, name, map_addr, flags }
        fid_av { fid, ops }
        fi_ops_av {
            size, insert, insertsvc, insertsym, remove, lookup, straddr, av_set, insert_auth_key, lookup_auth_key,
            set_user_id,
        }
        fi_cq_attr { size, flags, format, wait_obj, signaling_vector, wait_cond, wait_set }
        fid_cq { fid, ops }
        fi_ops_cq { size, read, readfrom, readerr, sread, sreadfrom, signal, strerror }
        fi_cq_data_entry { op_context, flags, len, buf, data }
        fi_cq_err_entry {
            op_context, flags, len, buf, data, tag, olen, err, prov_errno, err_data, err_data_size, src_addr,
        }
        fid_ep { fid, ops, cm, msg, rma, tagged, atomic, collective }
        fi_ops_ep { size, cancel, getopt, setopt, tx_ctx, rx_ctx, rx_size_left, tx_size_left }
        fi_ops_cm { size, setname, getname, getpeer, connect, listen, accept, reject, shutdown, join }
        fi_msg { msg_iov, desc, iov_count, addr, context, data }
        fi_ops_msg { size, recv, recvv, recvmsg, send, sendv, sendmsg, inject, senddata, injectdata }
        fi_rma_iov { addr, len, key }
        fi_msg_rma { msg_iov, desc, iov_count, addr, rma_iov, rma_iov_count, context, data }
        fi_ops_rma { size, read, readv, readmsg, write, writev, writemsg, inject, writedata, injectdata }
        fi_context2 { internal }
    }
}

fn constant_lines() -> Vec<Line> {
    use sys::*;
    let _ = FI_SUCCESS;
    constants![
        FI_MSG,
        FI_RMA,
        FI_READ,
        FI_WRITE,
        FI_RECV,
        FI_SEND,
        FI_TRANSMIT,
        FI_REMOTE_READ,
        FI_REMOTE_WRITE,
        FI_REMOTE_CQ_DATA,
        FI_MORE,
        FI_COMPLETION,
        FI_INJECT,
        FI_TRANSMIT_COMPLETE,
        FI_DELIVERY_COMPLETE,
        FI_HMEM,
        FI_LOCAL_COMM,
        FI_REMOTE_COMM,
        FI_CONTEXT,
        FI_CONTEXT2,
        FI_MR_LOCAL,
        FI_MR_RAW,
        FI_MR_VIRT_ADDR,
        FI_MR_ALLOCATED,
        FI_MR_PROV_KEY,
        FI_MR_ENDPOINT,
        FI_MR_HMEM,
        FI_MR_DMABUF,
        FI_KEY_NOTAVAIL,
        FI_HMEM_SYSTEM,
        FI_HMEM_CUDA,
        FI_FORMAT_UNSPEC,
        FI_SOCKADDR,
        FI_SOCKADDR_IN,
        FI_SOCKADDR_IN6,
        FI_ADDR_STR,
        FI_ADDR_EFA,
        FI_ADDR_UNSPEC,
        FI_ADDR_NOTAVAIL,
        FI_AV_UNSPEC,
        FI_AV_MAP,
        FI_AV_TABLE,
        FI_EP_MSG,
        FI_EP_DGRAM,
        FI_EP_RDM,
        FI_THREAD_UNSPEC,
        FI_THREAD_SAFE,
        FI_THREAD_DOMAIN,
        FI_PROGRESS_UNSPEC,
        FI_PROGRESS_AUTO,
        FI_PROGRESS_MANUAL,
        FI_CQ_FORMAT_CONTEXT,
        FI_CQ_FORMAT_MSG,
        FI_CQ_FORMAT_DATA,
        FI_WAIT_NONE,
        FI_WAIT_UNSPEC,
        FI_WAIT_FD,
        FI_BUS_PCI,
        FI_GETWAIT,
        FI_ENABLE,
        FI_OPT_ENDPOINT,
        FI_OPT_CUDA_API_PERMITTED,
        FI_OPT_SHARED_MEMORY_PERMITTED,
        FI_OPT_EFA_EMULATED_READ,
        FI_OPT_EFA_EMULATED_WRITE,
        FI_TYPE_INFO,
        FI_SUCCESS,
        FI_EINTR,
        FI_EAGAIN,
        FI_EBUSY,
        FI_EINVAL,
        FI_ENOSYS,
        FI_ENODATA,
        FI_EACCES,
        FI_EOPNOTSUPP,
        FI_ENOPROTOOPT,
        FI_ECANCELED,
        FI_ECONNREFUSED,
        FI_ECONNRESET,
        FI_ECONNABORTED,
        FI_ENOTCONN,
        FI_ETIMEDOUT,
        FI_EHOSTUNREACH,
        FI_ENETUNREACH,
        FI_EIO,
        FI_EREMOTEIO,
        FI_ESHUTDOWN,
        FI_EOTHER,
        FI_ETOOSMALL,
        FI_EAVAIL,
        FI_ETRUNC,
        FI_ENOKEY,
        FI_EOVERRUN,
        FI_ENORX,
        FI_ENOMR,
    ]
}

/// `$LIBFABRIC_INCLUDE`, or `include` beside the folder of `$LIBFABRIC_SO`.
fn include_folder() -> Option<PathBuf> {
    let named = std::env::var_os("LIBFABRIC_INCLUDE").map(PathBuf::from);
    let beside =
        || Some(PathBuf::from(std::env::var_os("LIBFABRIC_SO")?).parent()?.parent()?.join("include"));
    named.or_else(beside).filter(|folder| folder.join("rdma/fabric.h").is_file())
}

#[test]
fn bindings_agree_with_the_headers() {
    let Some(include) = include_folder() else {
        println!("skipped: no libfabric headers (set LIBFABRIC_INCLUDE)");
        return;
    };
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        println!("skipped: no C compiler (set CC)");
        return;
    }
    let lines: Vec<Line> = struct_lines().into_iter().chain(constant_lines()).collect();
    let mut program = String::from("#include <stdio.h>\n#include <stddef.h>\n");
    for header in ["fabric", "fi_domain", "fi_endpoint", "fi_cm", "fi_rma", "fi_eq", "fi_errno", "fi_ext"] {
        writeln!(program, "#include <rdma/{header}.h>").unwrap();
    }
    program.push_str("int main(void) {\n");
    for Line { what, c_values: [first, second], .. } in &lines {
        writeln!(
            program,
            "printf(\"{what} %llu %llu\\n\", (unsigned long long) ({first}), (unsigned long long) ({second}));"
        )
        .unwrap();
    }
    program.push_str("return 0; }\n");

    let folder = tempfile::tempdir().unwrap();
    let (source, binary) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&source, program).unwrap();
    let compiled =
        Command::new(&compiler).arg("-I").arg(&include).arg("-o").arg(&binary).arg(&source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&binary).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let found: BTreeMap<&str, [u64; 2]> = output
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let what = words.next().unwrap();
            (what, std::array::from_fn(|_| words.next().unwrap().parse().unwrap()))
        })
        .collect();

    assert_eq!(found.len(), lines.len(), "a name is listed twice");
    let wrong: Vec<String> = lines
        .iter()
        .filter(|line| found[line.what.as_str()] != line.values)
        .map(|line| format!("{}: C {:?}, here {:?}", line.what, found[line.what.as_str()], line.values))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{} structures, fields and constants agree", lines.len());
}
