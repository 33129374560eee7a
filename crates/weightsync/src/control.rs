//! What both kinds of session say to the controller, and what they make of an answer that they cannot follow.
//!
//! What is said when is not decided here: that is `rendezvous::member`.

use rendezvous::{Client, RendezvousError, ToController};

use crate::error::Error;

/// Says what the protocol has this rank say.
///
/// # Errors
///
/// [`Error::Broken`] where it has nothing to say: an earlier call ended in the middle.
pub(crate) fn say(client: &Client, message: Option<ToController>) -> Result<(), Error> {
    Ok(client.send(message.ok_or(Error::Broken)?)?)
}

/// The controller has this rank do something else than what it waited for.
pub(crate) fn out_of_turn(expected: &'static str) -> Error {
    let found = "a message out of turn".to_owned();
    Error::Rendezvous(RendezvousError::Unexpected { expected, found })
}
