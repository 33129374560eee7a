//! What a peer can say of itself, as a function of bytes: for the project's fuzz targets, and for nobody else.

use crate::endpoint::Endpoint;

/// Decodes an endpoint as a session does. What is taken must be the same after another trip, and is described.
pub fn endpoint(bytes: &[u8]) -> bool {
    let Ok(endpoint) = Endpoint::decode("inference 0", bytes) else { return false };
    let again = endpoint.encode().expect("what was decoded can be encoded");
    let twice = Endpoint::decode("inference 0", &again).expect("and decoded").encode().expect("and encoded");
    assert!(again == twice, "an endpoint changes on its way");
    let _ = endpoint.offers();
    for rail in &endpoint.rails {
        for region in rail.regions.iter().chain(&rail.scratch) {
            let (half, rest) = (region.len / 2, region.len - region.len / 2);
            assert!(region.at(half, rest).is_ok() || region.base.checked_add(region.len).is_none());
            assert!(region.at(half, rest + 1).is_err(), "a span past its region");
        }
    }
    endpoint.local.is_some_and(|local| local.doorman().name.len() < bytes.len())
}
